"""Whether admitting requests of one expert set together pays; see docs/scheduling-log.md.

`python -m benchmarks.scheduling predict` says what a small model of a step expects,
`python -m benchmarks.scheduling run --model MODEL` measures it: in one engine, in turn, with the
same requests, first come first served and grouped.
"""

import argparse
import heapq
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.checkpoints import DEMO, locate, num_experts
from benchmarks.machine import about
from benchmarks.workloads import tenant_sets
from expertgate.policies.expert_set import ExpertSet

_ZIPF = 1.1


def requests(
    experts: int, vocabulary: int, options: argparse.Namespace, seed: int
) -> list[SimpleNamespace]:
    """The tenant mix: sets by Zipf's law, lengths uniform, arrivals at once or Poisson."""
    dice = random.Random(f"{seed}/scheduling")
    tenants = tenant_sets(experts)
    weights = [1 / (place + 1) ** _ZIPF for place in range(len(tenants))]
    at, made = 0.0, []
    for _ in range(options.requests):
        if options.rate:
            at += dice.expovariate(options.rate)
        made.append(
            SimpleNamespace(
                at=at,
                experts=dice.choices(tenants, weights)[0],
                prompt=[dice.randrange(2, vocabulary) for _ in range(options.prompt)],
                output=dice.randint(options.output // 2, options.output * 3 // 2),
            )
        )
    return made


def distinct(asked: Sequence[tuple[ExpertSet, int]], top_k: int, experts: int) -> float:
    """Expected number of experts that `asked`, (set, tokens) each, hit if all are as likely."""
    found = 0.0
    for expert in range(experts):
        missed = 1.0
        for allowed, tokens in asked:
            if expert in allowed:
                missed *= (1 - min(top_k, len(allowed)) / len(allowed)) ** tokens
        found += 1 - missed
    return found


def simulate(
    made: Sequence[Any], options: argparse.Namespace, seqs: int, patience: int, cost: Any
) -> dict[str, float]:
    """The same admission, with a step that takes what `cost` says."""
    from expertgate.model.grouping import Lift

    lift = Lift(patience)
    waiting: list[int] = []
    running: dict[int, int] = {}
    todo = sorted(range(len(made)), key=lambda i: made[i].at)
    heapq.heapify(todo)
    now, step, done, hit = 0.0, 0, [], []
    while todo or waiting or running:
        while todo and made[todo[0]].at <= now:
            waiting.append(todo.pop(0))
        if not waiting and not running:
            now = made[todo[0]].at
            continue
        step += 1
        free = seqs - len(running)
        new: list[int] = []
        if free and waiting:
            # The server lets no more into the engine than keep it busy; see server/turns.py.
            visible = waiting[: int(seqs * options.room) - len(running)]
            places = list(range(min(free, len(visible))))
            if patience:
                asked = [(str(i), made[i].experts.mask) for i in visible]
                places = lift.choose(asked, free, step)
            new = [waiting[p] for p in places]
            waiting = [i for i in waiting if i not in new]
        batch = [(made[i].experts, 1) for i in running]
        batch += [(made[i].experts, len(made[i].prompt)) for i in new]
        seconds, experts = cost(batch)
        now += seconds
        hit.append(experts)
        running |= dict.fromkeys(new, 0)
        for i in list(running):
            running[i] += 1
            if running[i] == made[i].output:
                del running[i]
                done.append(now - made[i].at)
    tokens = sum(each.output for each in made)
    return {
        "tokens_per_s": tokens / now,
        "p99_s": _percentile(done, 99),
        "p50_s": _percentile(done, 50),
        "distinct": statistics.mean(hit),
    }


def _percentile(values: Sequence[float], p: int) -> float:
    ordered = sorted(values)
    return ordered[max(0, math.ceil(p * len(ordered) / 100) - 1)]


def step_cost(shape: Any, options: argparse.Namespace) -> Any:
    """Seconds of a step: a fixed part, distinct experts read, and the work of each pair."""

    def cost(batch: Sequence[tuple[ExpertSet, int]]) -> tuple[float, float]:
        top_k = shape["num_experts_per_tok"]
        experts = distinct(batch, top_k, shape["num_experts"])
        pairs = sum(min(top_k, len(s)) * n for s, n in batch)
        tokens = sum(n for _, n in batch)
        layers = shape["num_hidden_layers"]
        micro = options.fixed_us + tokens * options.token_us
        micro += layers * (experts * options.expert_us + pairs * options.pair_us)
        return micro / 1e6, experts

    return cost


class Engine:
    """vLLM in this process, so that the order of admission can be changed between runs."""

    def __init__(self, folder: Path, options: argparse.Namespace, seqs: int) -> None:
        import os

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_PLUGINS"] = "expertgate"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        self._llm = LLM(
            str(folder),
            max_model_len=options.prompt + 2 * options.output + 8,
            max_num_seqs=seqs,
            enforce_eager=True,
            enable_prefix_caching=True,
            kv_cache_memory_bytes=1 << 29,
            worker_cls="expertgate.model.cpu_worker.MaskedCPUWorker",
            scheduler_cls="expertgate.model.grouping.GroupingScheduler",
            additional_config={"expertgate_patience": 0},
            disable_log_stats=True,
        )
        self._engine = self._llm.llm_engine
        self._core = self._engine.engine_core.engine_core
        self._runs = 0

    def threads(self) -> None:
        import torch

        print(f"{torch.get_num_threads()} threads", flush=True)

    def run(self, made: Sequence[Any], patience: int) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from expertgate.model.grouping import Lift
        from expertgate.model.masks import EXTRA_ARG

        self._core.scheduler.lift = Lift(patience)
        self._engine.reset_prefix_cache()
        self._runs += 1
        todo = list(enumerate(made))
        answers: dict[str, list[int]] = {}
        done: dict[str, float] = {}
        steps = 0
        began = time.perf_counter()
        while todo or self._engine.has_unfinished_requests():
            now = time.perf_counter() - began
            while todo and todo[0][1].at <= now:
                place, request = todo.pop(0)
                self._engine.add_request(
                    str(place),
                    {
                        "prompt_token_ids": request.prompt,
                        "cache_salt": f"{self._runs}/{request.experts.text}",
                    },
                    SamplingParams(
                        temperature=0,
                        max_tokens=request.output,
                        ignore_eos=True,
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                        extra_args={EXTRA_ARG: request.experts.mask},
                    ),
                )
            if not self._engine.has_unfinished_requests():
                time.sleep(max(0.0, todo[0][1].at - now))
                continue
            steps += 1
            for output in self._engine.step():
                place = output.request_id.split("-")[0]
                done[place] = time.perf_counter() - began - made[int(place)].at
                answers[place] = list(output.outputs[0].token_ids)
        seconds = time.perf_counter() - began
        assert len(done) == len(made)
        return {
            "tokens_per_s": sum(map(len, answers.values())) / seconds,
            "p50_s": _percentile(list(done.values()), 50),
            "p99_s": _percentile(list(done.values()), 99),
            "steps": steps,
            "answers": answers,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("predict", "run"))
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--seqs", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--patience", type=int, nargs="+", default=[256])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s; 0: all at once")
    parser.add_argument("--room", type=float, default=1e6, help="in the engine, by max_num_seqs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fixed-us", type=float, default=10000)
    parser.add_argument("--token-us", type=float, default=0)
    parser.add_argument("--expert-us", type=float, default=0)
    parser.add_argument("--pair-us", type=float, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder, _ = locate(options.model)
    shape = json.loads((folder / "config.json").read_text())
    found: list[dict[str, Any]] = []
    facts = about() | {"command": " ".join(["python -m benchmarks.scheduling", *sys.argv[1:]])}
    for seqs in options.seqs:
        engine = Engine(folder, options, seqs) if options.what == "run" else None
        if engine is not None:
            engine.threads()
        for seed in range(options.rounds):
            made = requests(num_experts(folder), shape["vocab_size"], options, seed)
            if engine is not None and seed == 0:
                engine.run(made, 0)  # warm
            base: dict[str, Any] = {}
            for patience in [0, *options.patience]:
                if engine is None:
                    result: dict[str, Any] = simulate(
                        made, options, seqs, patience, step_cost(shape, options)
                    )
                else:
                    result = engine.run(made, patience)
                answers = result.pop("answers", None)
                base = base or {**result, "answers": answers}
                line = {
                    "seqs": seqs,
                    "round": seed,
                    "patience": patience,
                    **result,
                    "faster": result["tokens_per_s"] / base["tokens_per_s"],
                    "p99_ratio": result["p99_s"] / base["p99_s"],
                    "same_answers": None
                    if answers is None
                    else sum(answers[i] == base["answers"][i] for i in answers),
                }
                found.append(line)
                print(
                    " ".join(
                        f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}"
                        for k, v in line.items()
                    ),
                    flush=True,
                )
                if options.out:
                    whole = {"about": facts, "runs": found}
                    options.out.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
