"""One real server for all tests that speak HTTP: `expertgate serve` on a random checkpoint."""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.checkpoints import random_checkpoint
from tests.support.issuer import Issuer

EXPERTS = [
    {"index": 0, "name": "public", "owner": "ai2", "license": "odc-by", "tags": []},
    {"index": 1, "name": "math", "owner": "acme", "license": "closed", "tags": ["stem"]},
    {"index": 2, "name": "news", "owner": "courier", "license": "closed", "tags": ["press"]},
    {"index": 3, "name": "code", "owner": "quillon", "license": "closed", "tags": ["stem"]},
]
POLICIES = """
@id("public-for-all")
permit(principal, action == Action::"consult", resource == Expert::"public");
@id("stem-for-research")
permit(principal in Group::"research", action, resource) when { resource.tags.contains("stem") };
@id("alice-reads-news")
permit(principal == User::"alice", action, resource == Expert::"news");
@id("not-for-advertising")
forbid(principal, action, resource == Expert::"news")
when { context has purpose && context.purpose == "advertising" };
@id("the-press-reads-news")
permit(principal, action, resource == Expert::"news")
when { context.claims has department && context.claims.department == "press" };
@id("nothing-for-mallory")
forbid(principal == User::"mallory", action, resource);
"""
# alice: all four; dave: public, math, code; bob: public; mallory: nothing. The gateway `portal`
# and the issuer `corp` may say who is in research, and the issuer who is of which department.
GROUPS = {"alice": ["research"], "dave": ["research"], "bob": [], "mallory": []}
BLOCK_TOKENS = 128
ADMIN_TOKEN = "operator" * 8


@dataclass
class Server:
    folder: Path
    url: str
    process: subprocess.Popen[bytes]
    keys: dict[str, str] = field(default_factory=dict)
    issuer: Issuer | None = None

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def headers(self, user: str | None, **more: str) -> dict[str, str]:
        return more if user is None else {"Authorization": f"Bearer {self.keys[user]}", **more}

    def get(self, path: str, user: str | None = None, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers(user, **headers), timeout=60)

    def post(
        self, path: str, body: Any, user: str | None = "alice", **headers: str
    ) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **self.headers(user), **headers}
        return httpx.post(self.url + path, content=content, headers=sent, timeout=120)

    def chat(self, user: str = "alice", headers: dict[str, str] | None = None, **body: Any) -> Any:
        # The engine draws its seed at the start: without one here, some answers would end early.
        hi = [{"role": "user", "content": "hi"}]
        body = {"messages": hi, "max_tokens": 4, "ignore_eos": True, **body}
        return self.post("/v1/chat/completions", body, user, **(headers or {}))

    def complete(
        self, user: str = "alice", headers: dict[str, str] | None = None, **body: Any
    ) -> Any:
        body = {"prompt": "hi", "max_tokens": 4, "temperature": 0, **body}
        return self.post("/v1/completions", body, user, **(headers or {}))

    def admin(self, method: str, path: str, token: str | None = ADMIN_TOKEN) -> httpx.Response:
        """Asks at the operators' listener."""
        url = self.log.partition("operators: ")[2].split()[0]
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.request(method, url + path, headers=headers, timeout=60)

    def respond(
        self, user: str = "alice", headers: dict[str, str] | None = None, **body: Any
    ) -> Any:
        body = {"input": "hi", "max_output_tokens": 4, "ignore_eos": True, **body}
        return self.post("/v1/responses", body, user, **(headers or {}))

    @property
    def asks(self) -> tuple[Any, ...]:
        """Every route that generates."""
        return self.chat, self.complete, self.respond

    def effective(self, response: httpx.Response) -> list[str]:
        """What the response says was used, in all the places where it says so."""
        assert response.status_code == 200, response.text
        effective: list[str] = response.json()["experts"]["effective"]
        assert response.headers["x-experts-effective"] == ",".join(effective)
        return effective

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=60)

    def children(self) -> list[int]:
        """Process ids of all that the server started, at any depth."""
        found, frontier = [], [self.process.pid]
        while frontier:
            parent = frontier.pop()
            for path in Path("/proc").glob("[0-9]*/stat"):
                try:
                    fields = path.read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[1]) == parent:
                    found.append(int(path.parent.name))
                    frontier.append(found[-1])
        return found


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def prepare(folder: Path, issuer: Issuer | None = None, *, max_model_len: int = 2048) -> None:
    """A checkpoint with its catalogue, policies and a configuration; keys come by command."""
    issuers = [] if issuer is None else [issuer.config("corp")]
    identity = {"api_keys": "keys.yaml", "jwt": issuers}
    checkpoint = random_checkpoint(folder / "toy", num_experts=len(EXPERTS), top_k=2)
    (checkpoint / "experts.json").write_text(json.dumps({"version": 1, "experts": EXPERTS}))
    (folder / "policies").mkdir()
    (folder / "policies" / "all.cedar").write_text(POLICIES)
    (folder / "admin-token").write_text(ADMIN_TOKEN)
    (folder / "expertgate.yaml").write_text(
        "model: toy\n"
        f"identity: {json.dumps(identity)}\n"
        "claims: {department: string}\n"
        "policies: policies\n"
        "port: 0\n"
        "admin: {listen: '127.0.0.1:0', token: admin-token}\n"
        "engine:\n"
        f"  max_model_len: {max_model_len}\n"
        "  max_num_seqs: 8\n"
        "  enforce_eager: true\n"
        f"  kv_cache_memory_bytes: {1 << 27}\n"
        "  max_num_queued_reqs: 128\n"
    )


def expertgate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expertgate.server.cli", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def make_key(
    folder: Path, user: str, *groups: str, expires: str | None = None, may_assert: bool = False
) -> str:
    options = ["--may-assert"] if may_assert else []
    options += [part for group in groups for part in ("--group", group)]
    if expires is not None:
        options += ["--expires", expires]
    done = expertgate(folder, "keys", "create", "--id", user, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def start(
    folder: Path, *, ready: bool = True, command: Sequence[str] = ("-m", "expertgate.server.cli")
) -> Server:
    """`ready`: waits until its engine is up. `command`: what Python runs."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "serve"],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    server = Server(folder, "", process)
    if not ready:
        return server
    deadline = time.monotonic() + 500
    while "ready after" not in server.log:
        ended = process.poll() is not None or "will not be:" in server.log
        if ended or time.monotonic() > deadline:
            raise AssertionError(f"the server did not come up:\n{server.log[-4000:]}")
        time.sleep(0.2)
    server.url = server.log.partition(" at http://")[2].split()[0]
    server.url = f"http://{server.url}"
    return server


def stop(server: Server) -> None:
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.process.pid, signal.SIGKILL)


@functools.cache
def running() -> Server:
    """The server that all tests of a session share; it takes half a minute to start."""
    folder = Path(tempfile.mkdtemp(prefix="expertgate-test-"))
    issuer = Issuer()
    prepare(folder, issuer)
    keys = {user: make_key(folder, user, *groups) for user, groups in GROUPS.items()}
    keys["portal"] = make_key(folder, "portal", "research", may_assert=True)
    server = start(folder)
    server.keys, server.issuer = keys, issuer
    atexit.register(stop, server)
    return server
