"""What the whole server costs: `expertgate serve` beside stock vLLM's, over HTTP.

`python -m benchmarks.server --out FOLDER` starts both on the same checkpoint with the same engine
arguments: ours with API keys, policy, audit log (on disk before the engine is asked) and usage by
expert; vLLM's with its Transformers backend and keys. Both stay up, one is asked at a time, and
which comes first changes from round to round, so that whatever else the machine does meets both.
A client in a process of its own asks for streamed completions, with as many streams as the table
says: in some rows all begin at once, and ask again in step, for answers of one length; in the
others each goes at its own time, with answers of half to one and a half of that length, and the
first of each stream isn't counted. There a faster server has more requests to take, for its streams
ask again sooner; so both are then given the same arrivals, at four fifths of the rate that stock
vLLM had at best in that round, whatever becomes of those before. Last come arrivals at twice the
rate that the server itself had at best.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.checkpoints import BUILD, DEMO, SHAPES, locate, num_experts, weight_bytes
from benchmarks.command_line import command_line
from benchmarks.figures import Figures, figures
from benchmarks.load import Answer, Client, Job, client
from benchmarks.machine import PeakMemory, about
from benchmarks.report import Page, write
from benchmarks.servers import Server
from benchmarks.workloads import Size, workloads

OURS = "expertgate"
STOCK = "stock vLLM"
STREAMS = (1, 8, 32, 128)
_LEAST_REQUESTS = 8
SAME = "same arrivals"
_OF_CAPACITY = 0.8
"""Of stock vLLM's, that the same arrivals are."""
_SAME_S = 8
_OVERLOAD_S = 12
_FILLING_S = 2
"""Of these, while the batch fills: what comes later, until the last arrival, is compared."""

_BESIDE = (
    "Beside stock vLLM in the same round, median (lowest to highest). CPU milliseconds a token,"
    " medians: of the process that speaks HTTP + of the engine's."
)
_OVERLOAD = (
    "At twice the capacity, all rounds together: goodput to the peak of the same round, in tokens a"
    " second of requests answered whole, once the batch has filled and while more arrive; requests"
    " answered whole, refused (with `Retry-After`), broken off, hung."
)

Cost = Mapping[str, float]
"""CPU milliseconds a token: of the process that speaks HTTP, and of the engine's."""


def name_of(streams: int, apart: bool) -> str:
    return f"{streams} stream{'s' * (streams > 1)}{' apart' * apart}"


class Bench:
    """One server, and what was found of it."""

    def __init__(
        self, server: Server, client: Client, options: argparse.Namespace, folder: Path
    ) -> None:
        self.runs: dict[str, list[Figures]] = {}
        self.costs: dict[str, list[Cost]] = {}
        self.overloads: list[dict[str, float]] = []
        self._server = server
        self._client = client
        self._options = options
        self._folder = folder
        self._weights = weight_bytes(folder)
        self._vocabulary = int(json.loads((folder / "config.json").read_text())["vocab_size"])

    def warm(self) -> None:
        self._whole(self._job(32, seed=-1, streams=8))

    def run(self, streams: int, apart: bool, seed: int) -> str:
        """Each stream asks several times. Says what came of it."""
        turns = self._options.turns * (1 + apart)
        job = self._job(max(_LEAST_REQUESTS, streams * turns), seed, streams=streams, apart=apart)
        # Who asks first, where streams go apart, does so with all others.
        return self._run(name_of(streams, apart), job, streams * apart)

    def _run(self, name: str, job: Job, uncounted: int = 0) -> str:
        before = self._server.cpu_s()
        answers = self._whole(job)
        after = self._server.cpu_s()
        tokens = sum(job.output_tokens)
        times = [answer.times for answer in answers[uncounted:]]
        found = figures(times, self._memory(), self._weights)
        cost = {part: 1000 * (after[part] - before[part]) / tokens for part in after}
        self.runs.setdefault(name, []).append(found)
        self.costs.setdefault(name, []).append(cost)
        return (
            f"{name}: {found.tokens_per_s:.0f} tokens/s, first after"
            f" {found.ttft_ms['p50']:.1f} ms, CPU ms a token {_cost([cost])}"
        )

    def same(self, rate: float, seed: int) -> str:
        """Arrivals at `rate` requests a second. Says what came of it."""
        requests = max(_LEAST_REQUESTS, int(rate * _SAME_S))
        return self._run(SAME, self._job(requests, seed, rate=rate, apart=True))

    def best(self) -> Figures:
        """Of the last round."""
        return max((found[-1] for found in self.runs.values()), key=lambda f: f.tokens_per_s)

    def overload(self, seed: int) -> str:
        """Arrivals at twice the requests a second that this round had at best."""
        best = self.best()
        rate = 2 * best.requests_per_s
        answers = self._client.do(self._job(int(rate * _OVERLOAD_S), seed, rate=rate))
        whole = [answer for answer in answers if answer.whole]
        found = figures([answer.times for answer in whole], 0, self._weights)
        arrivals = [answer.times[0] for answer in answers]
        goodput = rate_between(whole, min(arrivals) + _FILLING_S, max(arrivals))
        refused = [answer for answer in answers if answer.status in (429, 503)]
        self.overloads.append(
            {
                "offered_per_s": rate,
                "goodput_to_peak": goodput / best.tokens_per_s,
                "answered": len(whole),
                "refused": len(refused),
                "refused_with_retry_after": sum(answer.retry_after for answer in refused),
                "hung": sum(answer.status == 0 for answer in answers),
                "broken": sum(answer.status == 200 and not answer.whole for answer in answers),
                "ttft_p50_ms": found.ttft_ms["p50"],
            }
        )
        return f"overload: {self.overloads[-1]}"

    def keep(self, rounds: int) -> None:
        """Forgets what is of later rounds than these."""
        self.overloads = self.overloads[:rounds]
        self.runs = {name: found[:rounds] for name, found in self.runs.items()}
        self.costs = {name: found[:rounds] for name, found in self.costs.items()}

    def _job(
        self,
        requests: int,
        seed: int,
        streams: int | None = None,
        rate: float | None = None,
        apart: bool = False,
    ) -> Job:
        size = Size(requests, self._options.prompt, self._options.output, 0)
        # The first of the workloads asks for all experts, which is all that vLLM can.
        every = workloads(num_experts(self._folder), self._vocabulary, size, seed)[0]
        prompts = [list(request.prompt) for request in every.requests]
        dice = random.Random(seed)
        half = size.output // 2 if apart else 0
        lengths = [size.output + dice.randint(-half, half) for _ in prompts]
        server = self._server
        return Job(server.url, servers.MODEL, server.keys, prompts, lengths, streams, rate, seed)

    def _whole(self, job: Job) -> list[Answer]:
        answers = self._client.do(job)
        failed = [answer.status for answer in answers if not answer.whole]
        if failed:
            raise SystemExit(f"{job.url}: {len(failed)} of {len(answers)} failed: {failed[:5]}")
        return answers

    def _memory(self) -> int:
        with PeakMemory([self._server.process.pid]) as memory:
            pass
        return memory.bytes


def rate_between(answers: Sequence[Answer], start: float, end: float) -> float:
    """Tokens a second that these brought from `start` to `end`."""
    count = sum(start <= time <= end for answer in answers for time in answer.times[1:])
    return count / (end - start)


def one_round(found: Mapping[str, Bench], streams: Sequence[int], turn: int) -> None:
    # Which comes first changes.
    order = list(found) if turn % 2 else list(found)[::-1]
    for apart in (False, True):
        for number in streams:
            for key in order:
                print(f"  {key}, {found[key].run(number, apart, seed=turn)}", flush=True)
    rate = _OF_CAPACITY * found[STOCK].best().requests_per_s
    for key in order:
        print(f"  {key}, {found[key].same(rate, seed=turn)}", flush=True)
    for key in order:
        print(f"  {key}, {found[key].overload(seed=turn)}", flush=True)


def three(values: Sequence[float], digits: int = 2) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def notes(ours: Bench, stock: Bench) -> list[str]:
    """The comparisons that the goals are about, of pairs of the same round."""

    def pairs(streams: str, value: Callable[[Figures], float]) -> list[tuple[float, float]]:
        return [
            (value(a), value(b))
            for a, b in zip(ours.runs[streams], stock.runs[streams], strict=True)
        ]

    lines = [
        "",
        _BESIDE,
        "",
        "| streams | tokens/s, ratio | TTFT p50, ms more | CPU ms a token, ours | stock's |",
        "| --- | --- | --- | --- | --- |",
    ]
    for streams in ours.runs:
        speed = [a / b for a, b in pairs(streams, lambda f: f.tokens_per_s)]
        wait = [a - b for a, b in pairs(streams, lambda f: f.ttft_ms["p50"])]
        costs = [_cost(bench.costs[streams]) for bench in (ours, stock)]
        lines.append(f"| {streams} | {three(speed)} | {three(wait, 1)} | {' | '.join(costs)} |")
    lines += [
        "",
        _OVERLOAD,
        "",
        "| server | goodput to peak | answered | refused | broken | hung | TTFT p50 ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, bench in ((OURS, ours), (STOCK, stock)):
        found = bench.overloads
        total = {key: sum(int(each[key]) for each in found) for key in found[0]}
        lines.append(
            f"| {name} | {three([each['goodput_to_peak'] for each in found])} |"
            f" {total['answered']} | {total['refused']} ({total['refused_with_retry_after']}) |"
            f" {total['broken']} | {total['hung']} |"
            f" {three([each['ttft_p50_ms'] for each in found], 0)} |"
        )
    return lines


def _cost(costs: Sequence[Cost]) -> str:
    return " + ".join(f"{statistics.median(c[part] for c in costs):.3f}" for part in costs[0])


def asked() -> argparse.Namespace:
    """What the command line says."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--model", default=str(DEMO), help=f"a checkpoint folder, or one of {', '.join(SHAPES)}"
    )
    parser.add_argument("--out", type=Path, help="figures.json, README.md and figures.png go there")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--turns", type=int, default=2, help="requests of each stream, in a round")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--kv-mib", type=int, default=512, help="KV cache of each engine")
    return parser.parse_args()


def main() -> None:
    options = asked()
    # As Ctrl-C: the servers end with the run.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder, _ = locate(options.model)
    engine: dict[str, Any] = {
        "max_model_len": options.prompt + options.output * 3 // 2 + 8,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 4096,
        # All may ask again while their last answers still end; a third of it stays free then.
        "max_num_queued_reqs": 384,
        "kv_cache_memory_bytes": options.kv_mib << 20,
        "enforce_eager": True,
    }
    facts = about() | {"command": " ".join(["python -m benchmarks.server", *sys.argv[1:]])}
    facts["model"] = f"{folder.name}, {weight_bytes(folder) / 1e9:.3f} GB of weights"
    facts["engine arguments"] = ", ".join(f"{key} {value}" for key, value in engine.items())
    for key, value in facts.items():
        print(f"{key}: {value}")
    BUILD.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        # Beside the checkpoints, on a real file system, for an fsync that is one.
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=BUILD))
        asking = stack.enter_context(client())
        starting = {
            OURS: servers.expertgate(Path(name) / "ours", folder, engine),
            STOCK: servers.stock(Path(name) / "stock", folder, engine),
        }
        found = {
            key: Bench(stack.enter_context(server), asking, options, folder)
            for key, server in starting.items()
        }
        for bench in found.values():
            bench.warm()
        done = 0
        with suppress(KeyboardInterrupt):  # what is whole by then is told
            for turn in range(options.rounds):
                print(f"round {turn + 1} of {options.rounds}", flush=True)
                one_round(found, options.streams, turn)
                done = turn + 1
    if not done:
        raise SystemExit("no round is whole")
    for bench in found.values():
        bench.keep(done)
    tell(found, facts, options)


def tell(found: Mapping[str, Bench], facts: Mapping[str, str], options: argparse.Namespace) -> None:
    """Prints the tables; with a folder, also writes them there."""
    page = Page(
        "The server beside stock vLLM's, over HTTP",
        {
            name_of(n, apart): f"{'each at its own time' if apart else 'at once'}, all experts"
            for apart in (False, True)
            for n in options.streams
        }
        | {SAME: f"{_OF_CAPACITY} of stock vLLM's best rate, all experts"},
        notes(found[OURS], found[STOCK]),
        {key: {"cpu_ms_per_token": b.costs, "overload": b.overloads} for key, b in found.items()},
    )
    size = {key: getattr(options, key) for key in ("rounds", "turns", "prompt", "output")}
    write(options.out, facts, size, {key: b.runs for key, b in found.items()}, OURS, page)


if __name__ == "__main__":
    main()
