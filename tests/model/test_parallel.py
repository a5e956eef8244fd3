"""Tensor and pipeline ranks each hold the masks: two of them answer as the oracle does."""

import os

import pytest
import torch

from expertgate.policies.expert_set import ExpertSet
from tests.support.checkpoints import random_checkpoint
from tests.support.engine import Ask, engine
from tests.support.oracle import RowDeletion
from tests.support.usage import assert_counted

SETS = [ExpertSet(mask) for mask in (1, 0b11, 127, 1 << 6, 0b1010101, 0b110)]

pytestmark = [
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a core for each rank"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("biased"), biases=True)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"tensor_parallel_size": 2}, id="tensor"),
        # Compiled, because vLLM's CPU runner makes what the ranks exchange while it warms up, and
        # without the compiler it doesn't. So this is the test of the compiled model as well.
        pytest.param(
            {"pipeline_parallel_size": 2, "enforce_eager": False}, id="pipeline, compiled"
        ),
    ],
)
def test_two_ranks_answer_as_if_the_others_were_deleted(folder, arguments, monkeypatch):
    # Else vLLM wants a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    prompt = list(b"Who may consult which expert?")
    with engine(folder, **arguments) as served:
        assert len(served.llm.collective_rpc("expertgate_facts")) == 2
        answers = served.ask([Ask(prompt, experts, account=experts.text) for experts in SETS])
        works = served.works(*(experts.text for experts in SETS))
    oracle = RowDeletion(folder)
    for experts, [answer], work in zip(SETS, answers, works, strict=True):
        forced = oracle.force(experts, prompt, answer.tokens)
        assert list(answer.tokens) == forced.best, experts.text
        assert answer.logprobs == pytest.approx(forced.logprobs, abs=2**-13), experts.text
        assert_counted(work, oracle, experts, [*prompt, *answer.tokens[:-1]])
