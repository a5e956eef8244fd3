"""What counting usage by expert costs: output tokens by second and CPU second, with and without.

`python -m benchmarks.usage` runs one engine and switches its counting off and on between runs, so
that whatever else the machine does meets both. With it, calls that end are asked for at once, those
of a step by one question, as the server does. Seconds of the engine's processes on a CPU tell more
than seconds on the clock where other programs share the machine. `--what emptying` switches another
thing that exactness asks for: what a block of the KV cache held is gone before others get it.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from benchmarks.checkpoints import DEMO
from benchmarks.command_line import command_line
from benchmarks.machine import about
from expertgate.kernels import mask_logits
from expertgate.model import cpu_process
from expertgate.model.flex_olmo import FlexOlmoMoE
from expertgate.model.ledger import ACCOUNT_ARG, Ledger
from expertgate.model.masks import EXTRA_ARG
from expertgate.policies.expert_set import ExpertSet

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as _Emptying

    from expertgate.model.cpu_worker import MaskedCPUWorker as _MaskedWorker

    _EMPTY = "_zero_block_ids"
else:
    from vllm.v1.worker.utils import KVBlockZeroer as _Emptying

    from expertgate.model.gpu_worker import MaskedGPUWorker as _MaskedWorker

    _EMPTY = "zero_block_ids"

WHAT = ("counting", "emptying")

REQUESTS, RUNNING = 32, 16
PROMPT_TOKENS = 64
OUTPUT_TOKENS = range(32, 97)


class SwitchableWorker(_MaskedWorker):
    """Does without what counting, or emptying, adds to a step, while it is switched off.

    Of counting on CPUs all but the stacking of the layers' plans, which the model gives either way.
    """

    def switch_emptying(self, on: bool) -> None:
        setattr(_Emptying, _EMPTY, _ON["empty"] if on else _nothing)

    def switch_counting(self, on: bool) -> None:
        layer: Any = FlexOlmoMoE
        ledger: Any = Ledger
        layer.masked_logits = _ON["layer"] if on else _uncounted_logits
        ledger.begin = _ON["begin"] if on else _nothing
        ledger.settle = _ON["settle"] if on else _nothing


_ON: dict[str, Any] = {
    "layer": FlexOlmoMoE.masked_logits,
    "begin": Ledger.begin,
    "settle": Ledger.settle,
    "empty": getattr(_Emptying, _EMPTY),
}


def _uncounted_logits(self: Any, router_logits: torch.Tensor) -> torch.Tensor:
    return mask_logits(router_logits, self.masks.words[: len(router_logits)], self.router_bias)


def _nothing(self: Any, *_step: Any) -> None:
    del self


def cpu_s() -> float:
    """Seconds that this process and all of the engine's have been on a CPU."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def measure(llm: LLM, experts: ExpertSet, what: str, on: bool) -> dict[str, float]:
    """Output tokens of one run of all requests, by second and by CPU second."""
    llm.collective_rpc(f"switch_{what}", args=(on,))
    counting = on or what != "counting"
    core = llm.llm_engine
    vocabulary = llm.model_config.get_vocab_size()
    total = 0
    for i in range(REQUESTS):
        length = OUTPUT_TOKENS[i * 29 % len(OUTPUT_TOKENS)]
        total += length
        params = SamplingParams(
            temperature=0,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            extra_args={EXTRA_ARG: experts.mask, ACCOUNT_ARG: str(i)},
        )
        prompt = {"prompt_token_ids": [(7 * i + 13 * j) % vocabulary for j in range(PROMPT_TOKENS)]}
        core.add_request(str(i), prompt, params)
    began, used = time.perf_counter(), cpu_s()
    while core.has_unfinished_requests():
        ended = [output.request_id for output in core.step() if output.finished]
        if ended and counting:
            llm.collective_rpc("expertgate_usage", args=(ended,))
    return {
        "tokens_per_s": total / (time.perf_counter() - began),
        "tokens_per_cpu_s": total / (cpu_s() - used),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder")
    parser.add_argument("--what", choices=WHAT, default=WHAT[0], help="what is switched")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of runs")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    count = json.loads((Path(options.model) / "config.json").read_text())["num_experts"]
    arguments: dict[str, Any] = {
        "model": options.model,
        "worker_cls": "benchmarks.usage.SwitchableWorker",
        "distributed_executor_backend": cpu_process.EXECUTOR,
        "max_model_len": 1024,
        "max_num_seqs": RUNNING,
        # A captured graph would keep what it was captured with, so there is none.
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 28,
    }
    with cpu_process.openmp(EngineArgs(**arguments).create_engine_config()):
        llm = LLM(**arguments)
    setting = about() | {
        "command": f"python -m benchmarks.usage --what {options.what} --rounds {options.rounds}",
        "model": "the demo model" if options.model == str(DEMO) else Path(options.model).name,
        "workload": f"{REQUESTS} requests, {RUNNING} at once, {PROMPT_TOKENS} tokens in,"
        f" {OUTPUT_TOKENS[0]} to {OUTPUT_TOKENS[-1]} out, greedy, eager",
    }
    for key, value in setting.items():
        print(f"{key}: {value}")
    figures: dict[str, Any] = {}
    for name, experts in {
        "all experts": ExpertSet.first(count),
        "public + one": ExpertSet.first(2),
    }.items():
        measure(llm, experts, options.what, on=True)
        pairs = []
        for turn in range(options.rounds):
            # Which comes first changes too.
            order = (False, True) if turn % 2 else (True, False)
            rates = {on: measure(llm, experts, options.what, on) for on in order}
            pairs.append((rates[True], rates[False]))
        figures[name] = {}
        for unit in pairs[0][0]:
            ratios = [on[unit] / off[unit] for on, off in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4)
            figures[name][unit] = {
                options.what: [on[unit] for on, _ in pairs],
                f"not_{options.what}": [off[unit] for _, off in pairs],
                "ratio_quartiles": [low, middle, high],
            }
            print(f"{name}, {unit}: {middle:.3f} of that without ({low:.3f} to {high:.3f})")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"about": setting, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
