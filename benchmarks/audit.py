"""What the audit log costs: the same server with it and without it, asked in turn, with real fsync.

`python -m benchmarks.audit` starts `expertgate serve` twice on the demo model, one with `audit:
{enabled: false}`, and asks them in alternating rounds, so that whatever else the machine does meets
both. Where other programs share the machine, its clock tells little; so the seconds that all of a
server's processes are on a CPU are told as well, per request. `--log-only` measures the log by
itself, without an engine: how long a record takes to be on disk while so many wait.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.machine import about

CLIENTS = 16
REQUESTS = 96
OUTPUT_TOKENS = 32
RECORDS = 2000
WAITING = (1, 16, 64)
_START_S = 300


def log_alone(folder: Path, waiting: int) -> dict[str, float]:
    """Milliseconds until a record is on disk, with so many under way, and records per second."""
    from expertgate.server.audit.signing import SigningKey
    from expertgate.server.audit.writer import AuditLog

    key = SigningKey.create(folder / f"{waiting}.pem")
    log = AuditLog(folder / f"{waiting}", key, rotate_bytes=64 << 20, sign_every=256)
    took: list[float] = []

    async def client() -> None:
        for _ in range(RECORDS // waiting):
            began = time.perf_counter()
            await log.append("request", request="0" * 32, principal="alice", effective=["public"])
            took.append((time.perf_counter() - began) * 1e3)

    async def run() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(waiting)))
        return time.perf_counter() - began

    seconds = asyncio.run(run())
    log.close()
    cuts = statistics.quantiles(took, n=100)
    return {"median_ms": cuts[49], "p99_ms": cuts[98], "records_per_s": len(took) / seconds}


@contextlib.contextmanager
def server(folder: Path, *, audited: bool) -> Iterator[tuple[httpx.Client, int]]:
    """A server of the demo model: a client that may ask it, and its process id."""
    from expertgate.server.demo import DEMO
    from expertgate.server.key_edits import create_key

    folder.mkdir()
    shutil.copytree(DEMO / "policies", folder / "policies")
    shutil.copy(DEMO / "model" / "experts.json", folder)
    key = create_key(folder / "keys.yaml", "nurse", ["clinical"], None)
    engine = {"max_model_len": 1024, "max_num_seqs": CLIENTS, "kv_cache_memory_bytes": 1 << 28}
    config: dict[str, Any] = {
        "model": str(DEMO / "model"),
        "catalogue": "experts.json",
        "identity": {"api_keys": "keys.yaml"},
        "policies": "policies",
        "audit": {"enabled": audited},
        "port": 0,
        "engine": {**engine, "enforce_eager": True},
    }
    (folder / "expertgate.yaml").write_text(json.dumps(config))
    said = folder / "said"
    with said.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "expertgate.server.cli", "serve"],
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + _START_S
        while "ready after" not in (text := said.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not come up:\n{text[-2000:]}")
            time.sleep(0.2)
        url = "http://" + text.partition(" at http://")[2].split()[0]
        limits = httpx.Limits(max_connections=CLIENTS)
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=url, headers=headers, limits=limits, timeout=120) as client:
            yield client, process.pid
    finally:
        process.terminate()
        process.wait()


def cpu_s(pid: int) -> float:
    """Seconds that this process and all that it started have been on a CPU."""
    here = psutil.Process(pid)
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def one_round(client: httpx.Client, clients: int, requests: int) -> tuple[float, float]:
    """Requests per second, and the median milliseconds of one."""

    def ask(number: int) -> float:
        body = {
            "prompt": f"{number} bottles",
            "max_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
        }
        began = time.perf_counter()
        client.post("/v1/completions", json=body).raise_for_status()
        return (time.perf_counter() - began) * 1e3

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        took = list(pool.map(ask, range(requests)))
    return requests / (time.perf_counter() - began), statistics.median(took)


def beside(folder: Path, rounds: int) -> dict[str, Any]:
    """The audited server's figures over the other's, round by round."""
    with (
        server(folder / "with", audited=True) as audited,
        server(folder / "without", audited=False) as plain,
    ):
        for client, _ in (audited, plain):
            one_round(client, CLIENTS, REQUESTS)  # warm
        rates: list[float] = []
        adds: list[float] = []
        costs: dict[int, list[float]] = {audited[1]: [], plain[1]: []}
        for turn in range(rounds):
            found, alone = {}, {}
            # Each goes first in half of the rounds.
            for client, pid in [audited, plain] if turn % 2 else [plain, audited]:
                used = cpu_s(pid)
                found[pid] = one_round(client, CLIENTS, REQUESTS)
                costs[pid].append((cpu_s(pid) - used) / REQUESTS * 1e3)
                alone[pid] = one_round(client, 1, REQUESTS // 8)
            rates.append(found[audited[1]][0] / found[plain[1]][0])
            adds.append(alone[audited[1]][1] - alone[plain[1]][1])
            with_ms, without_ms = costs[audited[1]][-1], costs[plain[1]][-1]
            print(
                f"round {turn + 1}: throughput x{rates[-1]:.3f}, median {adds[-1]:+.2f} ms, "
                f"CPU {with_ms:.2f} against {without_ms:.2f} ms a request"
            )
    ratio = [a / b for a, b in zip(costs[audited[1]], costs[plain[1]], strict=True)]
    return {
        "throughput_ratio": rates,
        "added_median_ms": adds,
        "cpu_ms_audited": costs[audited[1]],
        "cpu_ms_plain": costs[plain[1]],
        "cpu_ratio": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--log-only", action="store_true", help="without servers")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    figures: dict[str, Any] = {"about": about(), "log": {}}
    with tempfile.TemporaryDirectory(dir=".", prefix=".audit-bench-") as name:
        for waiting in WAITING:
            found = figures["log"][waiting] = log_alone(Path(name), waiting)
            print(f"{waiting:3} waiting:", ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
        if not options.log_only:
            figures["beside"] = beside(Path(name), options.rounds)
            for key, values in figures["beside"].items():
                low, middle, high = min(values), statistics.median(values), max(values)
                print(f"{key}: {middle:.3f} ({low:.3f} to {high:.3f})")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
