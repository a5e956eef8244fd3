"""Another model, worker or runner would not know masks, so workers prove which they run.

The settings that would bring one are in test_refused_settings.py.
"""

import asyncio
from types import SimpleNamespace

import pytest

from expertgate.model.flex_olmo import FlexOlmoForCausalLM
from expertgate.model.proof import ProvesMasks
from expertgate.server.cache_salts import CacheSalts
from expertgate.server.failures import ProofError
from expertgate.server.grants import Grants
from expertgate.server.guard import GuardedLLM
from expertgate.server.proof import check_facts, prove
from tests.server.audit.logs import RECORDED
from tests.server.fakes import FakeEngine

OURS = {
    "worker": "expertgate.model.cpu_worker.MaskedCPUWorker",
    "model_runner": "expertgate.model.cpu_worker.MaskedCPUModelRunner",
    "model": "expertgate.model.flex_olmo.FlexOlmoForCausalLM",
    "model.layers.0.mlp router": "expertgate.model.experts.MaskedRouter",
    "model.layers.0.mlp experts": "expertgate.model.experts.MaskedRoutedExperts",
    "model.layers.0.mlp kernel": "expertgate.model.masked_experts.MaskedExperts",
}


@pytest.mark.parametrize("part", OURS)
def test_a_worker_that_runs_another_class_is_not_served(part):
    check_facts(0, OURS)
    with pytest.raises(ProofError, match=part):
        check_facts(0, {**OURS, part: "vllm.model_executor.models.transformers.X"})


@pytest.mark.parametrize("part", OURS)
def test_a_worker_that_leaves_a_part_out_is_not_served(part):
    with pytest.raises(ProofError):
        check_facts(0, {name: found for name, found in OURS.items() if name != part})


def test_vllms_modular_kernels_are_served():
    name = "vllm.model_executor.layers.fused_moe.experts.triton_moe.TritonExperts"
    check_facts(0, {**OURS, "model.layers.0.mlp kernel": name})
    with pytest.raises(ProofError, match="experts"):
        check_facts(0, {**OURS, "model.layers.0.mlp experts": name})


def test_a_kernel_that_routes_by_itself_is_not_served():
    part = "model.layers.0.mlp experts"
    with pytest.raises(ProofError, match="monolithic"):
        check_facts(0, {**OURS, part: f"monolithic {OURS[part]}"})


@pytest.mark.parametrize("monolithic", [False, True])
def test_a_worker_tells_of_a_kernel_that_routes_by_itself(monkeypatch, monolithic):
    layers = [
        SimpleNamespace(
            prefix=prefix,
            experts=SimpleNamespace(
                is_monolithic=routes, router=None, routed_experts=SimpleNamespace(kernel=None)
            ),
        )
        for prefix, routes in (("first", False), ("mlp", monolithic))
    ]
    monkeypatch.setattr(FlexOlmoForCausalLM, "moe_layers", layers)
    model = FlexOlmoForCausalLM.__new__(FlexOlmoForCausalLM)
    worker = ProvesMasks()
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    assert worker.expertgate_facts()["mlp experts"].startswith("monolithic ") is monolithic


class Deaf(FakeEngine):
    """Gives one answer, whatever the mask."""

    class model_config:  # noqa: N801
        @staticmethod
        def get_vocab_size():
            return 320

    def __init__(self):
        super().__init__()
        self.model_config = Deaf.model_config()
        self.computed = 33

    async def collective_rpc(self, method, **arguments):
        if method == "expertgate_facts":
            return [OURS]
        return await super().collective_rpc(method, **arguments)


def test_an_engine_in_which_masks_change_nothing_is_not_served():
    grants = Grants()
    guard = GuardedLLM(Deaf(), grants, CacheSalts(b"w"))
    with pytest.raises(ProofError, match="masks"):
        asyncio.run(prove(guard, grants, 7, RECORDED))
    asyncio.run(prove(guard, grants, 1, RECORDED))  # with one expert there is nothing to tell apart
    assert len(grants) == 0


def test_an_engine_that_does_not_count_is_not_served():
    grants, engine = Grants(), Deaf()
    engine.computed = 0
    with pytest.raises(ProofError, match="counted"):
        asyncio.run(prove(GuardedLLM(engine, grants, CacheSalts(b"w")), grants, 1, RECORDED))
