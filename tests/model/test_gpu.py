"""What only a GPU can show: graphs, staged writes and Model Runner V2 for real."""

import math
import random

import pytest
import torch

from expertgate.model.moe_kernel import KERNELS, OPTION
from expertgate.policies.expert_set import ExpertSet
from expertgate.server.refusals import FP8_EXPERTS
from tests.model.test_non_interference import poison
from tests.support import fp8
from tests.support.checkpoints import random_checkpoint
from tests.support.engine import Ask, engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

ALL = ExpertSet.first(7)
CLEAN = [ExpertSet(mask) for mask in (0b1, 0b11, 0b1001, 0b1010011)]  # none has expert 2 or 5


def asks(count, seed):
    chance = random.Random(seed)
    return [
        Ask(
            chance.choices(range(256), k=chance.randint(3, 300)),
            CLEAN[i % len(CLEAN)],
            chance.randint(2, 40),
            salt=str(i),
        )
        for i in range(count)
    ]


MODES = [
    *((kernel, mode) for kernel in KERNELS for mode in ("eager", "graphs")),
    ("vllm", "fp8"),
    ("vllm", "fp8 on disk"),
]


@pytest.fixture(scope="module", params=MODES)
def served(request, tmp_path_factory):
    """A checkpoint whose experts 2 and 5 are NaN: any token that reaches them shows."""
    kernel, mode = request.param
    quantised = {}
    folder = random_checkpoint(tmp_path_factory.mktemp("poisoned"))
    if mode.startswith("fp8"):
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("this GPU multiplies no FP8")
        if mode == "fp8":
            quantised = {"quantization": "online", "quantization_config": FP8_EXPERTS}
        else:
            folder = fp8.quantised(folder, tmp_path_factory.mktemp("quantised") / "checkpoint")
    poison(folder / "model.safetensors")
    with engine(
        folder,
        dtype="bfloat16",
        max_num_seqs=16,
        enforce_eager=mode == "eager",
        additional_config={OPTION: kernel},
        **quantised,
    ) as running:
        running.kernel = kernel
        yield running


def test_model_runner_v2_runs_our_state(served):
    """Threat a5."""
    [facts] = served.llm.collective_rpc("expertgate_facts")
    assert facts["model_state"].startswith("expertgate.")


def test_the_kernels_that_were_asked_for_run(served):
    [facts] = served.llm.collective_rpc("expertgate_facts")
    names = {name for part, name in facts.items() if part.endswith(" kernel")}
    assert len(names) == 1
    assert names.pop().startswith(served.kernel + ".")


def test_slots_that_churn_never_reach_poisoned_experts(served):
    """Threats c2, c4, c5: more requests than slots, odd lengths, and scheduling that overlaps."""
    many = asks(200, seed=0)
    neighbours = [Ask([1, 2, 3], ALL, 30) for _ in range(20)]
    together = served.ask([*many, *neighbours])[: len(many)]
    for ask, [answer] in zip(many, together, strict=True):
        assert not any(math.isnan(value) for value in answer.logprobs)
        served.forget()
        assert served.ask_one(ask).tokens[:2] == answer.tokens[:2]
