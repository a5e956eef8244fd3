"""What choosing experts by request costs and saves, beside what people have today.

`python -m benchmarks.throughput --model MODEL --out FOLDER` runs every contender on the same
checkpoint and machine, in turn, each in processes of its own, several times:

- expertgate: this project's model in vLLM, one process for all sets;
- stock vLLM: its Transformers backend, which knows no sets, so it answers with all experts;
- one vLLM per set: stock vLLM, a process and a row-deleted checkpoint for each set of the tenants,
  all up at once, which is what people do who must keep experts apart;
- Transformers: Hugging Face's `generate` with the rows deleted, a batch for each set in turn.

See docs/benchmarks.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import (
    BUILD,
    DEMO,
    SHAPES,
    locate,
    num_experts,
    weight_bytes,
    without_others,
)
from benchmarks.command_line import command_line
from benchmarks.figures import Figures, figures, middle
from benchmarks.machine import PeakMemory, about
from benchmarks.report import earlier, write
from benchmarks.workloads import Size, tenant_sets, workloads

OURS = "expertgate"
STOCK = "stock vLLM"
FLEET = "one vLLM per set"
HUGGING_FACE = "Transformers"
CONTENDERS = (OURS, STOCK, FLEET, HUGGING_FACE)
KINDS = {OURS: "expertgate", STOCK: "stock", FLEET: "stock", HUGGING_FACE: "transformers"}

Command = list[str]


def commands(name: str, options: argparse.Namespace, folder: Path, seed: int) -> list[Command]:
    """The processes of a contender."""
    base = [sys.executable, "-m", "benchmarks.contender", KINDS[name], "--source", str(folder)]
    for key in ("requests", "prompt", "output", "system", "kv_mib"):
        base += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    base += ["--seed", str(seed)]
    base += ["--eager"] * options.eager + ["--dummy"] * options.dummy
    if name != FLEET:
        return [[*base, "--checkpoint", str(folder)]]
    return [
        [*base, "--checkpoint", str(part), "--only", text] for text, part in parts(folder).items()
    ]


def parts(folder: Path) -> dict[str, Path]:
    """Set → the checkpoint that has it alone, for each set of the tenants."""
    return {
        experts.text: without_others(folder, experts, BUILD / f"{folder.name}-{experts.text}")
        for experts in tenant_sets(num_experts(folder))
    }


@contextmanager
def running(name: str, lines: list[Command]) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of a contender, warm; they end with the block."""
    environment = dict(os.environ, VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # A name that is no plug-in: stock vLLM must not see ours.
    environment["VLLM_PLUGINS"] = "expertgate" if name == OURS else "none"
    # Several processes that each want every core would wait for one another, spinning.
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(lines)))
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    line,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for line in lines
        ]
        try:
            for process in processes:
                _answer(process, "ready")
            yield processes
        finally:
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()  # no more workloads: it ends


def _answer(process: subprocess.Popen[str], start: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line
    raise SystemExit(f"a contender ended with status {process.wait()}; its words are above")


def measure(name: str, options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Figures]:
    """Workload → figures, of one start of a contender."""
    lines = commands(name, options, folder, seed)
    held = parts(folder).values() if name == FLEET else [folder]
    weights = sum(weight_bytes(part) for part in held)
    found = {}
    with running(name, lines) as processes:
        for workload in asked(options, folder, seed):
            # A process for each of 31 random sets is nobody's plan.
            if name == FLEET and not set(workload.sets) <= set(tenant_sets(num_experts(folder))):
                continue
            runs: list[Figures] = []
            until = time.monotonic() + options.seconds
            memory = PeakMemory([process.pid for process in processes])
            while not runs or time.monotonic() < until:
                # In the first alone: reading how much memory they have holds the processes up.
                with nullcontext() if runs else memory:
                    for process in processes:
                        assert process.stdin is not None
                        print(workload.name, file=process.stdin, flush=True)
                    times = [t for process in processes for t in json.loads(_answer(process, "["))]
                assert len(times) == len(workload.requests)
                runs.append(figures(times, memory.bytes, weights))
            found[workload.name] = middle(runs)
            print(
                f"  {workload.name}: {found[workload.name].tokens_per_s:.0f} tokens/s, "
                f"the median of {max(1, len(runs) - 1)}",
                flush=True,
            )
    return found


def asked(options: argparse.Namespace, folder: Path, seed: int) -> list[Any]:
    size = Size(options.requests, options.prompt, options.output, options.system)
    vocabulary = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    return workloads(num_experts(folder), vocabulary, size, seed)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--model", default=str(DEMO), help=f"a checkpoint folder, or one of {', '.join(SHAPES)}"
    )
    parser.add_argument("--out", type=Path, help="figures.json, README.md and figures.png go there")
    parser.add_argument("--rounds", type=int, default=3, help="each contender runs in each")
    parser.add_argument(
        "--add", action="store_true", help="rounds to those that the folder of --out has already"
    )
    parser.add_argument("--contender", action="append", choices=CONTENDERS, dest="names")
    parser.add_argument("--eager", action="store_true", help="without vLLM's compiler, in all")
    parser.add_argument(
        "--seconds", type=float, default=4, help="a workload is asked again until it ran that long"
    )
    parser.add_argument("--kv-mib", type=int, default=512, help="KV cache of each engine")
    for name, default in vars(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.add and options.out is None:
        parser.error("--add needs --out, the folder whose rounds are added to")
    folder, options.dummy = locate(options.model)
    names = options.names or [n for n in CONTENDERS if not (options.dummy and n == HUGGING_FACE)]

    facts = about() | {"command": " ".join(["python -m benchmarks.throughput", *sys.argv[1:]])}
    model = "demo model" if options.model == str(DEMO) else folder.name
    facts["model"] = f"{model}, {weight_bytes(folder) / 1e9:.3g} GB of weights"
    size = {key: getattr(options, key) for key in vars(Size())}
    runs: dict[str, dict[str, list[Figures]]] = {name: {} for name in names}
    if options.add:
        facts, runs = earlier(options.out, facts, size, names)
    for key, value in facts.items():
        print(f"{key}: {value}")
    before = max(len(rounds) for rounds in runs[names[0]].values()) if options.add else 0
    for turn in range(before, before + options.rounds):
        for name in names:
            print(f"round {turn + 1} of {before + options.rounds}: {name}", flush=True)
            for workload, found in measure(name, options, folder, seed=turn).items():
                runs[name].setdefault(workload, []).append(found)
        # After each round, so that a run that is broken off has kept those it made.
        write(options.out, facts, size, runs, OURS)


if __name__ == "__main__":
    main()
