"""Our kernels inside vLLM's layer: chosen when asked for, and given what the router left.

A GPU is only pretended here, and the kernels run in Triton's interpreter, so in a process of their
own (`tests/kernels/test_interpreted.py`); `test_gpu.py` has the real thing.
"""

import copy
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.quantization import QuantizationConfigArgs
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.utils import replace_parameter
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

from expertgate.kernels import reference, routing
from expertgate.kernels.routing import NO_EXPERT
from expertgate.model import masked_experts, moe_kernel
from expertgate.model.experts import MaskedRoutedExperts, MaskedRouter
from expertgate.model.masked_experts import MaskedExperts
from tests.kernels import interpreter
from tests.support import fp8, vllms_moe

T, E, H, I, TOP_K = 5, 4, 32, 48, 3
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="test_interpreted.py runs it"
)


@pytest.fixture
def a_gpu(monkeypatch):
    """vLLM believes that it has one."""
    vllms_moe.a_gpu(monkeypatch)


def build(
    options, *, hidden=H, inner=I, num_experts=E, dtype=torch.float32, quantised=None, rank=None
):
    """vLLM's layer around ours, as `FlexOlmoMoE` makes it, and its weights.

    `quantised`: online, or as a checkpoint says that it is. `rank`: of two, or the only one.
    """
    config = VllmConfig(additional_config=options)
    config.compilation_config.static_forward_context = {}
    on_disk = quantised and "quant_method" in quantised
    scheme = quantised and (
        Fp8Config.from_config(quantised)
        if on_disk
        else OnlineQuantizationConfig(QuantizationConfigArgs(**quantised))
    )
    ranks = SimpleNamespace(world_size=1 if rank is None else 2, rank_in_group=rank or 0)
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(dtype),
        mock.patch.object(parallel_state, "_TP", ranks),
    ):
        made = FusedMoEFactory(
            num_experts=num_experts,
            top_k=TOP_K,
            hidden_size=hidden,
            intermediate_size=inner,
            params_dtype=dtype,
            renormalize=False,
            quant_config=scheme,
            router=MaskedRouter(top_k=TOP_K, num_experts=num_experts, renormalize=False),
            routed_experts_cls=MaskedRoutedExperts,
            prefix="experts",
            tp_size=ranks.world_size,
            dp_size=1,
            pcp_size=1,
        )
        experts = made.routed_experts
        chance = torch.Generator().manual_seed(0)
        kept = []
        for size in ((num_experts, 2 * inner, hidden), (num_experts, hidden, inner)):
            values = torch.randn(size, generator=chance, dtype=torch.float32) / size[-1] ** 0.5
            kept.append(values.to(dtype))
        if on_disk:
            loaded = set(experts.load_weights(tensors(*kept)))
            assert loaded == dict(experts.named_parameters()).keys()
        else:
            for name, values in zip(("w13_weight", "w2_weight"), kept, strict=True):
                replace_parameter(experts, name, values.clone())
        experts.quant_method.process_weights_after_loading(experts)
    return experts, *kept


def tensors(w13, w2):
    """Those of a checkpoint whose experts are FP8, under the names that they have in a layer."""
    for expert in range(len(w13)):
        gate, up = w13[expert].chunk(2)
        for part, weight in (("gate", gate), ("up", up), ("down", w2[expert])):
            values, scales = fp8.quantise(weight)
            yield f"{expert}.{part}_proj.weight", values
            yield f"{expert}.{part}_proj.weight_scale_inv", scales


@pytest.fixture
def batch():
    chance = torch.Generator().manual_seed(1)
    x, logits = torch.randn(T, H, generator=chance), torch.randn(T, E, generator=chance)
    allowed = torch.tensor([0b1, 0b11, 0b1111, 0b1000, 0b0])
    return x, routing.route(logits, allowed, top_k=TOP_K)


def test_of_vllms_kernels_those_in_triton_are_the_default(a_gpu):
    """FlashInfer's, which vLLM prefers on Blackwell, sum what was never written for empty slots."""
    experts, w13, w2 = build({})
    assert type(experts.kernel) is TritonExperts
    assert torch.equal(experts.w13_weight, w13)
    assert torch.equal(experts.w2_weight, w2)


def test_ours_are_chosen_when_asked_for(a_gpu):
    experts, w13, w2 = build({moe_kernel.OPTION: "expertgate"})
    assert type(experts.kernel) is MaskedExperts
    assert torch.equal(experts.w13_weight, w13)
    assert torch.equal(experts.w2_weight, w2)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"inner": 40}, "an inner size of 40 on each rank"),
        ({"num_experts": 65}, "65 experts"),
    ],
)
def test_what_they_cannot_run_is_an_error_and_not_another_kernel(a_gpu, sizes, said):
    with pytest.raises(ValueError, match=said):
        build({moe_kernel.OPTION: "expertgate"}, **sizes)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("in_dtype", torch.float64, "dtype torch.float64"),
        ("has_bias", True, "experts with biases"),
        ("experts_per_token", 17, "top_k 17"),
        ("hidden_dim", 40, "40 hidden dim"),
        ("activation", MoEActivation.GELU, "activation"),
        ("moe_parallel_config", SimpleNamespace(use_ep=True, dp_size=1), "parallel config"),
        ("moe_parallel_config", SimpleNamespace(use_ep=False, dp_size=2), "parallel config"),
    ],
)
def test_each_thing_that_they_cannot_is_told(a_gpu, setting, value, said):
    experts, *_ = build({moe_kernel.OPTION: "expertgate"})
    asked = copy.copy(experts.quant_method.moe)
    rest = (None, None, MaskedExperts.activation_format())
    assert MaskedExperts.is_supported_config(MaskedExperts, asked, *rest) == (True, None)
    setattr(asked, setting, value)
    supported, why = MaskedExperts.is_supported_config(MaskedExperts, asked, *rest)
    assert not supported
    assert said in why


def test_no_kernel_may_route_by_itself():
    router = MaskedRouter(top_k=TOP_K, num_experts=E, renormalize=False)
    assert router.routing_method_type is RoutingMethodType.Custom


def test_they_are_not_for_cpus():
    with pytest.raises(ValueError, match="current device cpu"):
        build({moe_kernel.OPTION: "expertgate"})


def test_a_misspelt_kernel_is_an_error():
    with pytest.raises(ValueError, match="may be expertgate or vllm"):
        build({moe_kernel.OPTION: "expertgates"})


FP8 = {"moe": "fp8_per_block"}


def test_of_quantised_experts_those_whose_rows_stand_alone_are_taken(a_gpu):
    experts, *_ = build({}, hidden=128, inner=128, dtype=torch.bfloat16, quantised=FP8)
    assert type(experts.kernel) is TritonExperts
    assert experts.kernel.block_shape == [128, 128]
    assert experts.w13_weight.dtype == experts.w2_weight.dtype == torch.float8_e4m3fn


def test_other_quantised_experts_are_an_error(a_gpu):
    """One scale for all rows: neighbours would show. The server refuses it before this."""
    with pytest.raises(ValueError, match="PerTensorOnlineMoEMethod: masks aren't shown to hold"):
        build({}, dtype=torch.bfloat16, quantised={"moe": "fp8_per_tensor"})


ON_DISK = fp8.settings(layers=1)
SCALED = ("w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv")


def test_what_is_fp8_on_disk_is_what_vllm_makes_of_the_same_weights(a_gpu):
    """To the bit, each expert's scales with its weights; and the same kernel runs it."""
    sizes = {"hidden": 256, "inner": 384, "dtype": torch.bfloat16}
    online, *_ = build({}, **sizes, quantised=FP8)
    on_disk, *_ = build({}, **sizes, quantised=ON_DISK)
    assert type(on_disk.kernel) is TritonExperts
    assert on_disk.empty == online.empty
    ways = [vars(layer.kernel.quant_config) for layer in (online, on_disk)]
    assert str(ways[0]) == str(ways[1])
    for name in SCALED:
        made, loaded = getattr(online, name), getattr(on_disk, name)
        assert made.dtype == loaded.dtype
        assert torch.equal(made.float(), loaded.float()), name
        assert not torch.equal(loaded[0].float(), loaded[1].float())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_gets_the_scales_of_its_part(a_gpu, rank):
    whole, *_ = build({}, hidden=128, inner=512, dtype=torch.bfloat16, quantised=ON_DISK)
    part, *_ = build({}, hidden=128, inner=512, dtype=torch.bfloat16, quantised=ON_DISK, rank=rank)
    for name in SCALED:
        mine, every = getattr(part, name).float(), getattr(whole, name).float()
        if name.startswith("w2"):
            want = every.chunk(2, dim=2)[rank]
        else:
            want = torch.cat([half.chunk(2, dim=1)[rank] for half in every.chunk(2, dim=1)], dim=1)
        assert torch.equal(mine, want), name


@pytest.mark.parametrize(
    ("own", "inner"),
    [
        ({"weight_block_size": [64, 64]}, 128),
        ({"weight_block_size": None}, 128),
        ({}, 192),  # of which vLLM makes blocks of 64
    ],
)
def test_other_experts_that_are_fp8_on_disk_are_an_error(a_gpu, own, inner):
    with pytest.raises(ValueError, match="Fp8MoEMethod: masks aren't shown to hold"):
        build({}, hidden=128, inner=inner, dtype=torch.bfloat16, quantised=ON_DISK | own)


@pytest.mark.parametrize("quantised", [FP8, ON_DISK])
@pytest.mark.parametrize("options", [{}, {moe_kernel.OPTION: "expertgate"}])
def test_quantised_experts_are_for_vllms_kernels_and_gpus(options, quantised, request):
    if options:
        request.getfixturevalue("a_gpu")
    with pytest.raises(ValueError, match="own MoE kernels: kernel does not support"):
        build(options, hidden=128, inner=128, dtype=torch.bfloat16, quantised=quantised)


def test_they_get_the_empty_slots_as_such(a_gpu, batch, monkeypatch):
    """And the weights, the plan and the place of the result, each where it belongs."""
    seen = []

    def experts(x, plan, w_gate_up, w_down, *, deterministic, out):
        seen.append((plan.experts.clone(), deterministic))
        out.copy_(reference.experts(x, plan, w_gate_up, w_down))

    monkeypatch.setattr("expertgate.kernels.gpu.layer.experts", experts)
    x, plan = batch
    layer, w13, w2 = build({moe_kernel.OPTION: "expertgate"})
    out = layer.forward_modular(x, plan.weights, plan.experts)
    assert torch.equal(out, reference.experts(x, plan, w13, w2))
    assert torch.equal(seen[0][0], plan.experts)
    assert (plan.experts == NO_EXPERT).any()
    assert seen[0][1] is False


def test_batch_invariance_fixes_their_shape(a_gpu, batch, monkeypatch):
    fixed = []
    monkeypatch.setattr(
        "expertgate.kernels.gpu.layer.experts",
        lambda *_, deterministic, out: fixed.append(deterministic),
    )
    x, plan = batch
    layer, *_ = build({moe_kernel.OPTION: "expertgate"})
    # Only now: no kernel of vLLM's for CPUs is batch invariant, and one is looked for first.
    monkeypatch.setattr(masked_experts.vllm.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    layer.forward_modular(x, plan.weights, plan.experts)
    assert fixed == [True]


def test_vllms_kernel_on_a_cpu_gets_the_pairs_that_name_an_expert(batch):
    x, plan = batch
    layer, w13, w2 = build({}, inner=64)
    out = layer.run_used(x, plan.weights, plan.experts)
    # float32 sums of at most 64 terms in another order.
    want = reference.experts(x, plan, w13, w2)
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-6)
    assert torch.equal(out[4], torch.zeros(H))


@interpreted
@pytest.mark.parametrize("kernel", moe_kernel.KERNELS)
def test_the_layer_equals_the_twin(kernel, a_gpu, batch, monkeypatch):
    """Beside what another batch left in its scratch, and with no work for empty slots."""
    worked = vllms_moe.runs(monkeypatch)
    reset_workspace_manager()
    init_workspace_manager(torch.device("cpu"))
    x, plan = batch
    layer, w13, w2 = build({moe_kernel.OPTION: kernel})
    every = routing.route(torch.randn(T, E), torch.full((T,), 0b1111), top_k=TOP_K)
    layer.forward_modular(torch.full_like(x, torch.nan), every.weights, every.experts)
    named = plan.experts.masked_fill(plan.experts == NO_EXPERT, layer.empty)
    out = layer.forward_modular(x, plan.weights, named)
    # float32 sums of at most 48 terms in another order.
    torch.testing.assert_close(
        out, reference.experts(x, plan, w13, w2), rtol=2e-5, atol=2e-6, equal_nan=False
    )
    if kernel == "vllm":
        assert worked == [T * TOP_K, int((plan.experts != NO_EXPERT).sum())]
    layer.w13_weight.data[2].fill_(torch.nan)
    layer.w2_weight.data[2].fill_(torch.nan)
    dirty = layer.forward_modular(x, plan.weights, named)
    untouched = ~(plan.experts == 2).any(dim=1)
    assert torch.equal(dirty[untouched], out[untouched])
    assert dirty[~untouched].isnan().all()


@interpreted
@pytest.mark.parametrize("quantised", [FP8, ON_DISK])
def test_the_quantised_layer_equals_the_twin(quantised, a_gpu, batch, monkeypatch):
    """Each row as it is alone, beside NaN of another batch and in experts that others may use."""
    interpreter.mend(monkeypatch)
    worked = vllms_moe.runs(monkeypatch)
    reset_workspace_manager()
    init_workspace_manager(torch.device("cpu"))
    layer, *_ = build({}, hidden=256, inner=128, dtype=torch.bfloat16, quantised=quantised)
    _, plan = batch
    x = torch.randn(T, 256, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    every = routing.route(torch.randn(T, E), torch.full((T,), 0b1111), top_k=TOP_K)
    layer.forward_modular(torch.full_like(x, torch.nan), every.weights, every.experts)
    named = plan.experts.masked_fill(plan.experts == NO_EXPERT, layer.empty)
    out = layer.forward_modular(x, plan.weights, named)
    assert worked == [T * TOP_K, int((plan.experts != NO_EXPERT).sum())]
    want = torch.zeros(T, 256)
    for row in range(T):
        for weight, expert in zip(plan.weights[row], plan.experts[row].tolist(), strict=True):
            if expert != NO_EXPERT:
                want[row] += weight * quantised_expert(layer, expert, x[row])
    # bfloat16 between the two products and behind them.
    torch.testing.assert_close(out.float(), want, rtol=2**-6, atol=2**-6)
    for row in range(T):
        rows = slice(row, row + 1)
        alone = layer.forward_modular(x[rows], plan.weights[rows], named[rows])
        assert torch.equal(alone[0], out[row])
    for name in SCALED:
        getattr(layer, name).data[2].fill_(torch.nan)
    dirty = layer.forward_modular(x, plan.weights, named)
    untouched = ~(plan.experts == 2).any(dim=1)
    assert torch.equal(dirty[untouched], out[untouched])
    assert dirty[~untouched].isnan().all()


def quantised_expert(layer, expert, x):
    """`x` [H] → what the expert gives [H], of its FP8 weights, both products' rows in FP8 too."""

    def product(row, weight, scales):
        whole = weight.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        values, own = vllms_moe.quantise(row[None])
        return whole @ (values.float() * own.repeat_interleave(128, 1))[0]

    inner = product(x, layer.w13_weight[expert], layer.w13_weight_scale_inv[expert])
    gate, up = inner.to(torch.bfloat16).float().chunk(2)
    active = torch.nn.functional.silu(gate) * up
    return product(active, layer.w2_weight[expert], layer.w2_weight_scale_inv[expert])
