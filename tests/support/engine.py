"""A real vLLM engine with our model, driven below HTTP: prompts in, tokens and their bits out."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from expertgate.model import cpu_process
from expertgate.model.ledger import ACCOUNT_ARG
from expertgate.model.masks import EXTRA_ARG
from expertgate.model.usage import Work
from expertgate.policies.expert_set import ExpertSet


def text(length: int, seed: int = 0) -> list[int]:
    """A prompt of so many tokens, all of which are bytes to the tests' own checkpoints."""
    return random.Random(seed).choices(range(256), k=length)


@dataclass(frozen=True)
class Ask:
    """One request; requests with another set or salt share no cached prefix."""

    prompt: Sequence[int]
    experts: ExpertSet
    tokens: int = 12
    salt: str = ""
    n: int = 1
    temperature: float = 0.0
    account: str | None = None
    stop: int | None = None


@dataclass(frozen=True)
class Answer:
    """Tokens and the log-probability of each, exactly as the engine gave them."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached: int


class Engine:
    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def ask(self, asks: Sequence[Ask]) -> list[list[Answer]]:
        """All at once, so that they share batches; for each its `n` answers."""
        prompts = [
            {"prompt_token_ids": list(a.prompt), "cache_salt": f"{a.experts.text}/{a.salt}"}
            for a in asks
        ]
        params = [
            SamplingParams(
                temperature=a.temperature,
                seed=0 if a.temperature else None,
                max_tokens=a.tokens,
                n=a.n,
                logprobs=0,
                ignore_eos=True,
                stop_token_ids=None if a.stop is None else [a.stop],
                detokenize=False,
                extra_args={EXTRA_ARG: a.experts.mask, ACCOUNT_ARG: a.account},
            )
            for a in asks
        ]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [
            [
                Answer(
                    tuple(choice.token_ids),
                    tuple(
                        step[token].logprob
                        for step, token in zip(choice.logprobs, choice.token_ids, strict=True)
                    ),
                    output.num_cached_tokens,
                )
                for choice in output.outputs
            ]
            for output in outputs
        ]

    def ask_one(self, ask: Ask) -> Answer:
        [[answer]] = self.ask([ask])
        return answer

    def works(self, *accounts: str) -> list[Work]:
        """What was counted for these accounts, which are closed; all ranks put together."""
        ranks = self.llm.collective_rpc("expertgate_usage", args=(list(accounts),))
        calls = zip(*filter(None, ranks), strict=True)
        return [
            Work.over_ranks([Work(*r[:3], tuple(r[3]), tuple(r[4])) for r in call])
            for call in calls
        ]

    def forget(self) -> None:
        """Empties the prefix cache."""
        assert self.llm.reset_prefix_cache()

    def counter(self, name: str) -> float:
        """The value of one of vLLM's own counters."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)


@contextmanager
def engine(folder: Path, **arguments: Any) -> Iterator[Engine]:
    """Starts vLLM on the checkpoint; `arguments` are vLLM's own."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": 128,
        "kv_cache_memory_bytes": 1 << 28,
        "disable_log_stats": False,
    }
    if current_platform.is_cpu():
        settings["worker_cls"] = "expertgate.model.cpu_worker.MaskedCPUWorker"
        if cpu_process.is_alone(arguments):
            settings["distributed_executor_backend"] = cpu_process.EXECUTOR
    else:
        settings["worker_cls"] = "expertgate.model.gpu_worker.MaskedGPUWorker"
    settings |= arguments
    config = EngineArgs(str(folder), **settings).create_engine_config()
    with cpu_process.openmp(config):
        llm = LLM(str(folder), **settings)
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
