"""Servers to measure: `expertgate serve` with everything on, and stock vLLM's own."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from expertgate.server.key_edits import create_key

MODEL = "measured"
"""What both call it."""
KEYS = 4
ADMIN_TOKEN = "operator" * 8
_START_S = 300
POLICIES = """
@id("all-for-research")
permit(principal in Group::"research", action == Action::"consult", resource);
@id("public-for-all")
permit(principal, action == Action::"consult", resource == Expert::"public");
@id("no-advertising")
forbid(principal, action == Action::"consult", resource)
when { context has purpose && context.purpose == "advertising" };
"""


@dataclass(frozen=True)
class Server:
    """One that answers; `keys` are credentials it takes, each of another user."""

    url: str
    folder: Path
    keys: list[str]
    process: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text(errors="replace")

    @property
    def pids(self) -> dict[str, list[int]]:
        """Of the process that speaks HTTP, and of those that run the model."""
        engine = psutil.Process(self.process.pid).children(recursive=True)
        return {"server": [self.process.pid], "engine": [each.pid for each in engine]}

    def cpu_s(self) -> dict[str, float]:
        """Seconds that each part has been on a CPU."""
        return {part: sum(_cpu_s(pid) for pid in pids) for part, pids in self.pids.items()}


def _cpu_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


@contextlib.contextmanager
def expertgate(folder: Path, checkpoint: Path, engine: Mapping[str, Any]) -> Iterator[Server]:
    """Ours: API keys, policy, audit log and usage on, operators' listener open; all may use all."""
    folder.mkdir(parents=True)
    keys = [create_key(folder / "keys.yaml", f"user-{n}", ["research"], None) for n in range(KEYS)]
    (folder / "policies").mkdir()
    (folder / "policies" / "all.cedar").write_text(POLICIES)
    (folder / "admin-token").write_text(ADMIN_TOKEN)
    config = {
        "model": str(checkpoint.absolute()),
        "identity": {"api_keys": "keys.yaml"},
        "policies": "policies",
        "port": 0,
        "admin": {"listen": "127.0.0.1:0", "token": "admin-token"},
        "engine": {"served_model_name": MODEL, **engine},
    }
    (folder / "expertgate.yaml").write_text(json.dumps(config))
    with serving(folder) as (url, process):
        yield Server(url, folder, keys, process)


@contextlib.contextmanager
def serving(
    folder: Path, module: str = "expertgate.server.cli"
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server by the configuration in `folder`, once it is ready, and its URL.

    `module`: what serves.
    """
    here = {"PYTHONPATH": str(Path(__file__).parents[1])}
    with _started([sys.executable, "-m", module, "serve"], folder, here) as process:
        said = _wait(process, folder, lambda text: "ready after" in text)
        yield "http://" + said.partition(" at http://")[2].split()[0], process


@contextlib.contextmanager
def stock(folder: Path, checkpoint: Path, engine: Mapping[str, Any]) -> Iterator[Server]:
    """vLLM's, its Transformers backend, with the same arguments; it checks keys, and no more."""
    folder.mkdir(parents=True)
    # In hex: vLLM would take one that begins with a dash for a flag.
    keys = [secrets.token_hex(32) for _ in range(KEYS)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `vllm serve` runs; the command itself asks for a version that the CPU build doesn't have.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += ["--model", str(checkpoint.absolute()), "--model-impl", "transformers"]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--api-key", *keys]
    for name, value in engine.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    url = f"http://127.0.0.1:{port}"
    # A name that is no plug-in: stock vLLM must not see ours.
    with _started(command, folder, {"VLLM_PLUGINS": "none"}) as process:
        _wait(process, folder, lambda _: _answers(url))
        yield Server(url, folder, keys, process)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


@contextlib.contextmanager
def _started(
    command: list[str], folder: Path, more: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **quiet, "PYTHONUNBUFFERED": "1", **more},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], folder: Path, ready: Any) -> str:
    """What it has said by then."""
    deadline = time.monotonic() + _START_S
    while not ready(text := (folder / "said").read_text(errors="replace")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the server did not come up:\n{text[-2000:]}")
        time.sleep(0.2)
    return text
