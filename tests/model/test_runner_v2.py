"""What `test_gpu.py` shows on a GPU, as far as it can be shown without one.

vLLM's GPU runner with our model state and the kernels of a GPU, under asynchronous scheduling, on
CPU tensors: `tests/support/runner_v2.py`. In a process of its own, because both Triton and vLLM
must know before they are imported that kernels are interpreted.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vllm.platforms import current_platform

from benchmarks.checkpoints import without_others
from expertgate.model.moe_kernel import KERNELS, OPTION
from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet
from expertgate.server.refusals import FP8_EXPERTS
from tests.model.test_non_interference import CLEAN, POISONED, poison
from tests.support import fp8, runner_v2
from tests.support.checkpoints import random_checkpoint
from tests.support.engine import Ask, engine, text
from tests.support.oracle import RowDeletion
from tests.support.usage import assert_counted

ROOT = Path(__file__).parents[2]
ALL = ExpertSet.first(7)
SETS = [CLEAN, ExpertSet.of([0, 1]), PUBLIC_ONLY, ExpertSet.of([3])]
# More requests than slots; one is longer than a step, and four want more blocks than there are, so
# that one of them is preempted.
LENGTHS = [31, 62, 5, 40, 30, 3]
LIMITS = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "max_model_len": 96,
    "block_size": 32,
    "num_gpu_blocks_override": 6,
}
FP8 = {
    "online": {"quantization": "online", "quantization_config": FP8_EXPERTS},
    "on disk": {},
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(not current_platform.is_cpu(), reason="takes vLLM's attention for CPUs")
def test_without_a_gpu():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.skipif(not INTERPRETED, reason="test_without_a_gpu runs it")
@pytest.mark.parametrize("kernel", KERNELS)
def test_slots_that_churn_never_reach_poisoned_experts(kernel, tmp_path, monkeypatch):
    """Threats a5, c2, c4, c5: NaN moves no bit of those who exclude it, beside those who do not.

    And what is answered and counted is the row-deleted model's.
    """
    runner_v2.pretend(monkeypatch)
    folder = random_checkpoint(tmp_path, inner=64, layers=2, biases=True)
    asks = [
        Ask(text(length, i), SETS[i % len(SETS)], 5 - i % 3, account=str(i))
        for i, length in enumerate(LENGTHS)
    ]
    clean, works = served(folder, kernel, asks)
    oracle = RowDeletion(folder)
    for ask, answer, work in zip(asks, clean, works, strict=True):
        forced = oracle.force(ask.experts, ask.prompt, answer.tokens)
        assert list(answer.tokens) == forced.best, ask.experts.text
        # Float32, as in test_row_removal.py.
        assert answer.logprobs == pytest.approx(forced.logprobs, abs=2**-13), ask.experts.text
        assert_counted(work, oracle, ask.experts, [*ask.prompt, *answer.tokens[:-1]])
    poison(folder / "model.safetensors")
    assert served(folder, kernel, asks) == (clean, works)


@pytest.mark.skipif(not INTERPRETED, reason="test_without_a_gpu runs it")
@pytest.mark.parametrize("how", FP8)
def test_experts_in_fp8_answer_as_those_of_the_row_deleted_model(how, tmp_path, monkeypatch):
    """To the bit, whoever is beside them and whatever else was quantised; NaN moves none.

    On disk it is in the scales too.
    """
    runner_v2.pretend(monkeypatch)
    folder = random_checkpoint(tmp_path / "whole", inner=128, layers=2)
    if how == "on disk":
        folder = fp8.quantised(folder, tmp_path / "quantised")
    settings = {"dtype": "bfloat16", **FP8[how]}
    asks = [
        Ask(text(length, i), SETS[i % len(SETS)], 5 - i % 3, account=str(i))
        for i, length in enumerate(LENGTHS)
    ]
    clean, works = served(folder, "vllm", asks, **settings)
    for experts in SETS[:2]:
        deleted = without_others(folder, experts, tmp_path / experts.text)
        whole = ExpertSet.first(len(experts))
        with running_engine(deleted, "vllm", **settings) as alone:
            [types] = alone.llm.apply_model(expert_types)
            assert types == {torch.float8_e4m3fn}
            for ask, answer in zip(asks, clean, strict=True):
                if ask.experts == experts:
                    assert alone.ask_one(replace(ask, experts=whole)) == answer, experts.text
    poison(folder / "model.safetensors")
    assert served(folder, "vllm", asks, **settings) == (clean, works)


def expert_types(model):
    return {layer.experts.routed_experts.w2_weight.dtype for layer in model.moe_layers}


def running_engine(folder, kernel, **arguments):
    arguments = LIMITS | arguments
    options = {OPTION: kernel}
    return engine(folder, worker_cls=runner_v2.WORKER, additional_config=options, **arguments)


def served(folder, kernel, asks, **arguments):
    """Their answers and work, beside some that may consult the experts which others may not."""
    beside = [Ask(text(20, 7), ALL, 6), Ask(text(10, 8), POISONED, 4)]
    with running_engine(folder, kernel, **arguments) as running:
        [facts] = running.llm.collective_rpc("expertgate_facts")
        assert facts["model_state"] == "expertgate.model.model_state.MaskedModelState"
        kernels = {name for part, name in facts.items() if part.endswith(" kernel")}
        assert [name.partition(".")[0] for name in kernels] == [kernel]
        assert running.llm.llm_engine.engine_core.engine_core.batch_queue is not None
        answers = running.ask([*asks[:1], *beside, *asks[1:]])
        assert running.counter("vllm:num_preemptions") > 0, "nothing was preempted"
        mine = [answer for [answer] in answers[:1] + answers[1 + len(beside) :]]
        return mine, running.works(*(ask.account for ask in asks))
