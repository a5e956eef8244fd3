"""Does the server hold? Ten minutes of load, faults and changes, and what is left of them.

`python -m benchmarks.soak --out FOLDER` starts `expertgate serve` with everything on and asks it on
all routes that generate, for random sets of experts. Clients leave in the middle, or before the
first token; some send too much, or a key that isn't one. Meanwhile policies are reloaded, keys
rotated, experts suspended and resumed, each of which ends requests that run. Every answer must be
whole or say why not, with a code that fits. In the end nothing may be left running, a last request
is answered, the audit log verifies and has a result for every request, and no process has grown by
more than 5% after its warm-up, which is the first fifth. It ends with status 1 where any of that
does not hold.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks import servers
from benchmarks.checkpoints import BUILD, DEMO
from benchmarks.command_line import command_line
from benchmarks.machine import about
from expertgate.server.key_edits import rotate_key

CLIENTS = 12
HUNG_S = 90.0
_SAMPLE_S = 5.0
_GROWTH = 0.05
_TOO_LARGE = b" " * (1 << 20) + b"{}"

_FITTING = {
    "whole": {200, 401, 403},
    "too large": {401, 413},
    "too long": {400, 401, 403},
    "misspelt": {400, 401},
    "no key": {401},
}
"""What is asked → the statuses that are a right answer to it while permissions change."""
_KINDS = {"whole": 10, "leaving": 4, "too large": 1, "too long": 1, "misspelt": 1, "no key": 1}
"""How many there are of each in eighteen."""
_WITHDRAWN = '"expert_withdrawn"'


@dataclass
class Target:
    """A running server, and what can be done to it. `keys`: user → secret, of research all."""

    url: str
    admin_url: str
    admin_token: str
    folder: Path
    log: Path
    pid: int
    model: str
    keys: dict[str, str]
    experts: list[str]


@dataclass
class Soak:
    """Load and changes; `outcomes` counts what came of it, `faults` are those that may not be."""

    target: Target
    seed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)
        self._policies = self.target.folder / "policies" / "all.cedar"
        self._rules = self._policies.read_text()
        self._suspended: set[str] = set()
        kinds = [kind for kind, times in _KINDS.items() for _ in range(times)]
        self._dice.shuffle(kinds)
        self._kinds = itertools.cycle(kinds)
        self._reloads = itertools.cycle(["less one", "all", "broken", "all"])

    async def run(self, seconds: float) -> None:
        """Leaves policies and suspensions as it found them."""
        until = time.monotonic() + seconds
        limits = aiohttp.ClientTimeout(total=HUNG_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=limits) as session:
            changes = [
                asyncio.create_task(self._again(change, session, every))
                for change, every in (
                    (self._suspend_or_resume, 1.5),
                    (self._reload, 2.5),
                    (self._rotate, 4.0),
                )
            ]
            await asyncio.gather(*(self._client(session, until) for _ in range(CLIENTS)))
            for change in changes:
                change.cancel()
            for ended in await asyncio.gather(*changes, return_exceptions=True):
                if not isinstance(ended, asyncio.CancelledError):
                    self._fault(f"a change failed: {ended!r}")
            for name in self.target.experts[1:]:
                await self._admin(session, name, "resume")
        self._policies.write_text(self._rules)

    # --- load -----------------------------------------------------------------------------------

    async def _client(self, session: aiohttp.ClientSession, until: float) -> None:
        while time.monotonic() < until:
            kind = next(self._kinds)
            try:
                outcome = await self._ask(session, kind)
            except TimeoutError:
                outcome = self._fault(f"{kind}: no end after {HUNG_S:.0f} s")
            except aiohttp.ClientError as error:
                # Of a body that is too large the rest is not read, and sending it may fail.
                cut = kind == "too large"
                outcome = "cut off" if cut else self._fault(f"{kind}: {error!r}")
            self.outcomes[f"{kind}: {outcome}"] += 1

    async def _ask(self, session: aiohttp.ClientSession, kind: str) -> str:
        path, body = self._request(kind)
        stream = kind == "leaving" or self._dice.random() < 0.5
        user = self._dice.choice(list(self.target.keys))
        key = "eg-none" if kind == "no key" else self.target.keys[user]
        data = (
            _TOO_LARGE if kind == "too large" else json.dumps({**body, "stream": stream}).encode()
        )
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        leave_after = self._dice.choice([0.0, 0.01, 0.05, 0.2]) if kind == "leaving" else None
        asking = session.post(self.target.url + path, data=data, headers=headers)
        if leave_after is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(leave_after), asking as response:
                    await response.read()
                    return f"{response.status} before"
            return "left"
        async with asking as response:
            text = (await response.read()).decode()
            return self._judge(kind, response.status, text, stream)

    def _request(self, kind: str) -> tuple[str, dict[str, Any]]:
        path = self._dice.choice(["/v1/chat/completions", "/v1/completions", "/v1/responses"])
        length = self._dice.randint(1, 48)
        text = " ".join(str(self._dice.randrange(1000)) for _ in range(self._dice.randint(1, 24)))
        if kind == "too long":
            text = f"{text} " * (100_000 // len(text))
        body: dict[str, Any] = {"model": self.target.model}
        if path == "/v1/responses":
            body |= {"input": text, "max_output_tokens": length}
        elif path == "/v1/completions":
            body |= {"prompt": text, "max_tokens": length}
        else:
            body |= {"messages": [{"role": "user", "content": text}], "max_tokens": length}
        if kind == "misspelt":
            body["expert"] = ["public"]
        elif self._dice.random() < 0.7:
            closed = self.target.experts[1:]
            chosen = self._dice.sample(closed, self._dice.randint(0, len(closed)))
            body["experts"] = [self.target.experts[0], *chosen]
        return path, body

    def _judge(self, kind: str, status: int, text: str, stream: bool) -> str:
        if status not in _FITTING[kind]:
            return self._fault(f"{kind}: {status} {text[:200]}")
        if status != 200:
            return f"{status} {json.loads(text)['error']['code']}"
        if not stream:
            return "200" if "experts" in json.loads(text) else self._fault(f"{kind}: {text[:200]}")
        if _WITHDRAWN in text:
            return "200 and withdrawn"
        whole = text.endswith("data: [DONE]\n\n") or "event: response.completed\n" in text
        return "200" if whole and '"effective"' in text else self._fault(f"{kind}: …{text[-300:]}")

    def _fault(self, words: str) -> str:
        self.faults.append(words)
        return "FAULT"

    # --- changes --------------------------------------------------------------------------------

    async def _again(self, change: Any, session: aiohttp.ClientSession, every: float) -> None:
        while True:
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * every)
            await change(session)

    async def _suspend_or_resume(self, session: aiohttp.ClientSession) -> None:
        if self._suspended:
            await self._admin(session, self._suspended.pop(), "resume")
        else:
            await self._admin(session, self._dice.choice(self.target.experts[1:]), "suspend")

    async def _admin(self, session: aiohttp.ClientSession, name: str, what: str) -> None:
        headers = {"Authorization": f"Bearer {self.target.admin_token}"}
        url = f"{self.target.admin_url}/admin/experts/{name}/{what}"
        async with session.post(url, headers=headers) as response:
            if response.status != 200:
                self._fault(f"{what} {name}: {response.status} {await response.text()}")
        (self._suspended.add if what == "suspend" else self._suspended.discard)(name)
        self.outcomes[what] += 1

    async def _reload(self, _: aiohttp.ClientSession) -> None:
        """What all had, or less one expert; now and then what can't be read."""
        name = self._dice.choice(self.target.experts[1:])
        less = f'\n@id("soak") forbid(principal, action, resource == Expert::"{name}");\n'
        kind = next(self._reloads)
        rules = {"all": self._rules, "less one": self._rules + less, "broken": "permit("}
        self._policies.write_text(rules[kind])
        if self._dice.random() < 0.3:
            os.kill(self.target.pid, signal.SIGHUP)
        self.outcomes[f"policies: {kind}"] += 1

    async def _rotate(self, _: aiohttp.ClientSession) -> None:
        user = self._dice.choice(list(self.target.keys))
        grace = timedelta(seconds=self._dice.choice([0, 5]))
        path = self.target.folder / "keys.yaml"
        self.target.keys[user] = await asyncio.to_thread(rotate_key, path, user, grace, None)
        self.outcomes["key rotated"] += 1


_MEMORY = (
    "Memory, MB of proportional set size: medians of the second and the last fifth of the time."
)


# --- what is left -------------------------------------------------------------------------------


class Memory:
    """PSS and RSS of the server's processes in MB, every few seconds, with the time since."""

    def __init__(self, pid: int) -> None:
        self.series: dict[str, list[tuple[float, float, float]]] = {}
        self._root = psutil.Process(pid)
        self._began = time.monotonic()

    async def watch(self) -> None:
        while True:
            self._sample()
            await asyncio.sleep(_SAMPLE_S)

    def _sample(self) -> None:
        at = round(time.monotonic() - self._began, 1)
        for process in (self._root, *self._root.children(recursive=True)):
            with contextlib.suppress(psutil.Error, IndexError):
                title = "server" if process == self._root else process.cmdline()[0]
                if title == "server" or title.startswith("VLLM::"):
                    info = process.memory_full_info()
                    found = (at, round(info.pss / 1e6, 1), round(info.rss / 1e6, 1))
                    self.series.setdefault(title, []).append(found)

    def ends(self) -> dict[str, tuple[float, float]]:
        """Of each process the median PSS in the second fifth of the time, and in the last."""
        return {name: _ends([pss for _, pss, _ in each]) for name, each in self.series.items()}


def _ends(values: list[float]) -> tuple[float, float]:
    fifth = max(1, len(values) // 5)
    return statistics.median(values[fifth : 2 * fifth]), statistics.median(values[-fifth:])


async def left_over(target: Target) -> dict[str, float]:
    """The gauges that must be nothing when nobody asks, after a while for the last to end."""
    names = (
        "expertgate_places_held",
        "expertgate_calls_waiting",
        "expertgate_audit_records_waiting",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
    )
    headers = {"Authorization": f"Bearer {target.admin_token}"}
    found: dict[str, float] = {}
    async with aiohttp.ClientSession() as session:
        for _ in range(20):
            async with session.get(f"{target.admin_url}/metrics", headers=headers) as response:
                text = await response.text()
            found = dict.fromkeys(names, 0.0)
            for line in text.splitlines():
                name = line.partition("{")[0].partition(" ")[0]
                if name in found:
                    found[name] += float(line.rpartition(" ")[2])
            if not any(found.values()):
                break
            await asyncio.sleep(0.5)
    return found


async def last_request(target: Target) -> int:
    """The status of one that must be answered."""
    headers = {"Authorization": f"Bearer {next(iter(target.keys.values()))}"}
    body = {"model": target.model, "prompt": "still there?", "max_tokens": 4}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=HUNG_S)) as session,
        session.post(f"{target.url}/v1/completions", json=body, headers=headers) as response,
    ):
        return response.status


def audit_faults(folder: Path) -> list[str]:
    """What `expertgate audit verify` says of a log that was closed, and requests without result."""
    command = [sys.executable, "-m", "expertgate.server.cli", "audit"]
    public = subprocess.run(
        [*command, "public-key", "audit-key.pem"], cwd=folder, capture_output=True, check=True
    )
    (folder / "public.json").write_bytes(public.stdout)
    done = subprocess.run(
        [*command, "verify", "audit", "--key", "public.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr, sep="")
    faults = [] if done.returncode == 0 else [f"the audit log does not verify: {done.stderr}"]
    open_requests: set[str] = set()
    for path in sorted((folder / "audit").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "request":
                open_requests.add(record["request"])
            elif record["kind"] == "result":
                open_requests.discard(record["request"])
    return faults + ([f"{len(open_requests)} requests have no result"] if open_requests else [])


async def soak(target: Target, seconds: float) -> tuple[Soak, Memory]:
    found, memory = Soak(target), Memory(target.pid)
    logged = target.log.stat().st_size
    watching = asyncio.create_task(memory.watch())
    await found.run(seconds)
    watching.cancel()
    await asyncio.sleep(1)  # policies and suspensions are as they were
    if left := {name: value for name, value in (await left_over(target)).items() if value}:
        found.faults.append(f"left over: {left}")
    if (status := await last_request(target)) != 200:
        found.faults.append(f"the last request: {status}")
    _, *tracebacks = target.log.read_bytes()[logged:].decode(errors="replace").split("Traceback ")
    found.faults += [f"in the server's log: {text[:4000]}" for text in tracebacks[:3]]
    return found, memory


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, help="soak.json and README.md go there")
    options = parser.parse_args()
    # As Ctrl-C: the server ends with the run.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    facts = about() | {"command": " ".join(["python -m benchmarks.soak", *sys.argv[1:]])}
    for key, value in facts.items():
        print(f"{key}: {value}", flush=True)
    # A cache that is full within the warm-up: its pages are the machine's once they are written to.
    engine = {
        "max_model_len": 512,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 16 << 20,
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        folder = Path(name) / "soak"
        with servers.expertgate(folder, DEMO, engine) as server:
            found, memory = asyncio.run(soak(_target(server), options.minutes * 60))
        found.faults += audit_faults(folder)
    found.faults += [
        f"{name} has grown from {early} MB to {late}"
        for name, (early, late) in memory.ends().items()
        if late > (1 + _GROWTH) * early
    ]
    text = in_words(facts, found, memory)
    print(text)
    if options.out:
        write(options.out, facts, found, memory, text)
    sys.exit(bool(found.faults))


def _target(server: servers.Server) -> Target:
    experts = json.loads((DEMO / "experts.json").read_text())["experts"]
    return Target(
        url=server.url,
        admin_url=server.said.partition("operators: ")[2].split()[0],
        admin_token=servers.ADMIN_TOKEN,
        folder=server.folder,
        log=server.folder / "said",
        pid=server.process.pid,
        model=servers.MODEL,
        keys={f"user-{n}": key for n, key in enumerate(server.keys)},
        experts=[expert["name"] for expert in experts],
    )


def in_words(facts: Mapping[str, str], found: Soak, memory: Memory) -> str:
    lines = ["# The server under load, faults and changes", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", f"Faults: {len(found.faults)}.", *(f"- {fault}" for fault in found.faults[:20])]
    lines += ["", "| what was asked or done: what came of it | times |", "| --- | --- |"]
    lines += [f"| {name} | {count} |" for name, count in sorted(found.outcomes.items())]
    lines += ["", _MEMORY, "", "| process | second fifth | last fifth | growth |"]
    lines.append("| --- | --- | --- | --- |")
    for name, (early, late) in memory.ends().items():
        lines.append(f"| {name} | {early:.0f} | {late:.0f} | {late / early - 1:+.1%} |")
    return "\n".join(lines) + "\n"


def write(out: Path, facts: Mapping[str, str], found: Soak, memory: Memory, text: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(text)
    whole = {
        "about": facts,
        "faults": found.faults,
        "outcomes": dict(sorted(found.outcomes.items())),
        "memory_s_pss_mb_rss_mb": memory.series,
    }
    (out / "soak.json").write_text(json.dumps(whole) + "\n")


if __name__ == "__main__":
    main()
