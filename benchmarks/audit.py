"""What the audit log costs: one server with its log and without it in turn, with real fsync.

`python -m benchmarks.audit` starts `expertgate serve` on the demo model, or on the one that
`--model` names, and switches its audit log on and off from round to round (`switched.py`): of
servers that are alike some are faster for as long as they run, by more than a log costs, and
whatever else the machine does meets both. Throughput is what a server gives whose engine always has
somebody waiting, so twice as many ask as it runs; what a request takes longer is measured with one
that asks alone. Where other programs share the machine, its clock tells little; so the seconds that
all of the server's processes are on a CPU are told as well, per request. `--log-only` measures the
log by itself, without an engine: how long a record takes to be on disk while so many wait.
"""

import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.checkpoints import BUILD, DEMO, SHAPES, locate
from benchmarks.command_line import command_line
from benchmarks.load import Client, Job, client
from benchmarks.machine import about
from benchmarks.servers import serving
from benchmarks.switched import OFF, ON
from expertgate.model.catalogue import FILE_NAME

RUNNING = 16
CLIENTS = 2 * RUNNING
REQUESTS = 512
PROMPT_TOKENS = 16
OUTPUT_TOKENS = 32
RECORDS = 2000
WAITING = (1, 16, 64)


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
def server(
    folder: Path, model: Path, module: str = "expertgate.server.cli"
) -> Iterator[tuple[str, str, int]]:
    """A server of `model`: its URL, a key, and its process id. `module`: what serves.

    The demo model comes with its policies; of another all is granted.
    """
    from expertgate.server.key_edits import create_key

    folder.mkdir()
    if model == DEMO:
        shutil.copytree(DEMO.parent / "policies", folder / "policies")
    else:
        (folder / "policies").mkdir()
        (folder / "policies" / "all.cedar").write_text("permit(principal, action, resource);\n")
    key = create_key(folder / "keys.yaml", "nurse", ["clinical"], None)
    described = {}
    if (model / FILE_NAME).exists():
        shutil.copy(model / FILE_NAME, folder)
        described["catalogue"] = FILE_NAME
    engine = {"max_model_len": 1024, "max_num_seqs": RUNNING, "kv_cache_memory_bytes": 1 << 28}
    config: dict[str, Any] = {
        "model": str(model),
        **described,
        "identity": {"api_keys": "keys.yaml"},
        "policies": "policies",
        "port": 0,
        "engine": {**engine, "enforce_eager": True},
    }
    (folder / "expertgate.yaml").write_text(json.dumps(config))
    with serving(folder, module) as (url, process):
        yield url, key, process.pid


def cpu_s(pid: int) -> float:
    """Seconds that this process and all that it started have been on a CPU."""
    here = psutil.Process(pid)
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def one_round(
    asking: Client, url: str, model: str, key: str, clients: int, count: int, tokens: int
) -> tuple[float, float]:
    """Requests per second, and the median milliseconds of one."""
    prompts = [[2 + (7 * n + 13 * m) % 200 for m in range(PROMPT_TOKENS)] for n in range(count)]
    lengths = [tokens] * count
    began = time.perf_counter()
    answers = asking.do(Job(url, model, [key], prompts, lengths, streams=clients))
    seconds = time.perf_counter() - began
    if not all(answer.whole for answer in answers):
        raise SystemExit(f"statuses {sorted({answer.status for answer in answers})}")
    took = [(answer.times[-1] - answer.times[0]) * 1e3 for answer in answers]
    return count / seconds, statistics.median(took)


def beside(
    folder: Path, model: Path, rounds: int, requests: int, tokens: int
) -> dict[str, list[float]]:
    """Figures with the log over those without it, and what they are made of, round by round."""
    few = max(requests // 16, 4)
    found: dict[str, list[float]] = {}
    with client() as asking, server(folder, model, "benchmarks.switched") as (url, key, pid):

        def measured(*, audited: bool) -> tuple[float, float, float]:
            """Requests per second, milliseconds of one alone, and of CPU for each."""
            os.kill(pid, ON if audited else OFF)
            used = cpu_s(pid)
            rate, _ = one_round(asking, url, model.name, key, CLIENTS, requests, tokens)
            cpu_ms = (cpu_s(pid) - used) / requests * 1e3
            return rate, one_round(asking, url, model.name, key, 1, few, tokens)[1], cpu_ms

        measured(audited=True)  # warm
        for turn in range(rounds):
            of: dict[bool, tuple[float, float, float]] = {}
            for audited in (turn % 2 == 0, turn % 2 == 1):  # each goes first in as many rounds
                of[audited] = measured(audited=audited)
            (rate, alone_ms, cpu_ms), without = of[True], of[False]
            told = {
                "throughput_ratio": rate / without[0],
                "added_median_ms": alone_ms - without[1],
                "cpu_ms_audited": cpu_ms,
                "cpu_ms_plain": without[2],
                "cpu_ratio": cpu_ms / without[2],
            }
            for name, value in told.items():
                found.setdefault(name, []).append(value)
            print(f"round {turn + 1}:", ", ".join(f"{k} {v:.3f}" for k, v in told.items()))
    lines = b"".join(path.read_bytes() for path in (folder / "audit").glob("*.jsonl"))
    recorded = lines.count(b'"kind":"request"')
    if recorded != (rounds + 1) * (requests + few):
        raise SystemExit(f"{recorded} requests have a record: the log was not switched as told")
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of all rounds there could be lies, at 95%, by resampling these."""
    draw = random.Random(0)
    medians = [statistics.median(draw.choices(values, k=len(values))) for _ in range(2000)]
    cuts = statistics.quantiles(medians, n=40)
    return cuts[0], cuts[-1]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default=str(DEMO), help="a folder, or one of random shape")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each round")
    parser.add_argument("--output", type=int, default=OUTPUT_TOKENS, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--log-only", action="store_true", help="without servers")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    command = {"command": " ".join(["python -m benchmarks.audit", *sys.argv[1:]])}
    figures: dict[str, Any] = {"about": about() | command, "log": {}}
    BUILD.mkdir(parents=True, exist_ok=True)
    model = Path(options.model)
    if options.model in SHAPES:
        model, _ = locate(options.model)
    # Beside the checkpoints, on a real file system, for an fsync that is one.
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        for waiting in WAITING:
            found = figures["log"][waiting] = log_alone(Path(name), waiting)
            print(f"{waiting:3} waiting:", ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
        if not options.log_only:
            compared = beside(
                Path(name) / "server", model, options.rounds, options.requests, options.output
            )
            figures["beside"] = compared
            for what, values in compared.items():
                low, high = interval(values)
                print(f"{what}: median {statistics.median(values):.3f} ({low:.3f} to {high:.3f})")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
