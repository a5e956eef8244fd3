"""The Triton kernels: compiled where there is a GPU, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so `test_interpreted.py` runs this file in
a process of its own; run otherwise without a GPU, it is skipped.
"""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertgate.kernels import masked_moe, routing
from tests.kernels.cases import DTYPES, layer, layers, words

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = torch.cuda.is_available() and not INTERPRETED
if not (COMPILED or INTERPRETED):
    pytest.skip(
        "needs an NVIDIA GPU; test_interpreted.py runs it without one", allow_module_level=True
    )

from expertgate.kernels.gpu import grouping  # noqa: E402
from expertgate.kernels.gpu import layer as gpu  # noqa: E402
from expertgate.kernels.gpu import routing as gpu_routing  # noqa: E402
from expertgate.kernels.gpu.shapes import Device, Shape, Tiles, choose  # noqa: E402

DEVICE = "cuda" if COMPILED else "cpu"
needs_gpu = pytest.mark.skipif(not COMPILED, reason="needs an NVIDIA GPU")

TILES = Tiles(16, 32, 32, num_warps=4, num_stages=2)
SHAPES = {
    "plain": Shape(TILES, TILES),
    "swapped, split": Shape(replace(TILES, swap=True), replace(TILES, swap=True, split_k=3)),
    "persistent, described": Shape(
        replace(TILES, group_m=2, descriptors=True, programs_per_sm=1),
        replace(TILES, group_m=2, descriptors=True, programs_per_sm=1, split_k=2),
    ),
}


def some(examples):
    """The interpreter takes about a second a layer, the compiler as long for some of them."""
    return settings(
        max_examples=20 if COMPILED else examples,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """What is not written shows: memory begins as NaN, or as a huge integer."""

    def spoiling(make):
        def made(*arguments, **options):
            out = make(*arguments, **options)
            if out.is_floating_point():
                return out.fill_(torch.nan)
            return out.fill_(torch.iinfo(out.dtype).max)

        return made

    monkeypatch.setattr(torch, "empty", spoiling(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", spoiling(torch.Tensor.new_empty))


if INTERPRETED:
    from tests.kernels import interpreter

    @pytest.fixture(autouse=True)
    def a_mended_interpreter(monkeypatch):
        interpreter.mend(monkeypatch)


@pytest.fixture(params=SHAPES)
def shape(request):
    if "described" in request.param and COMPILED and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU with tensor descriptors")
    return SHAPES[request.param]


def run(case, shape):
    on = case.to(DEVICE)
    plan = gpu_routing.route(on.router_logits, on.allowed, **on.options)
    return gpu.experts(on.x, plan, on.w_gate_up, on.w_down, shape=shape).cpu()


@st.composite
def routings(draw):
    """Logits [T, E] with ties, infinities and the like among them, masks, a bias and a top_k."""
    T, E = draw(st.integers(0, 40)), draw(st.sampled_from([1, 2, 7, 33, 64]))
    masks = draw(st.lists(st.integers(0, 2**E - 1), min_size=T, max_size=T))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(T, E, generator=chance) * 4
    odd = torch.tensor([0.0, -0.0, 1.0, 1.0, -200.0, -torch.inf])
    which = torch.randint(0, 12, (T, E), generator=chance)
    logits = torch.where(which < len(odd), odd[which.clamp(max=5)], logits)
    bias = torch.randn(E - 1, generator=chance) if draw(st.booleans()) else None
    dtype = draw(st.sampled_from(DTYPES))
    return logits.to(dtype), words(masks), bias, draw(st.integers(1, 16)), draw(st.booleans())


def both(logits, masks, bias, top_k, renormalize):
    options = {"top_k": top_k, "renormalize": renormalize}
    want = routing.route(logits, masks, router_bias=bias, **options)
    bias = None if bias is None else bias.to(DEVICE)
    got = gpu_routing.route(logits.to(DEVICE), masks.to(DEVICE), router_bias=bias, **options)
    return got.weights.cpu(), got.experts.cpu(), want


@some(12)
@given(routings())
def test_routing_equals_its_twin(case):
    weights, experts, want = both(*case)
    assert torch.equal(experts, want.experts)
    # Exponentials, and a sum of 64 of them in another order: a few float32 roundoffs.
    torch.testing.assert_close(weights, want.weights, rtol=1e-5, atol=1e-7)


@some(4)
@given(routings())
def test_masking_equals_its_twin(case):
    logits, masks, bias, top_k, renormalize = case
    on = [None if t is None else t.to(DEVICE) for t in (logits, masks, bias)]
    copy = torch.full(logits.shape, torch.nan, device=DEVICE)
    masked = gpu_routing.mask_logits(*on, copy)
    assert torch.equal(masked.cpu(), routing.mask_logits(logits, masks, bias))
    assert torch.equal(copy, masked)
    direct = gpu_routing.route(
        on[0], on[1], top_k=top_k, router_bias=on[2], renormalize=renormalize
    )
    again = gpu_routing.route(masked, None, top_k=top_k, renormalize=renormalize, empty=64)
    assert torch.equal(
        again.experts, direct.experts.masked_fill(direct.experts == routing.NO_EXPERT, 64)
    )
    assert torch.equal(again.weights, direct.weights)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_logits_outside_the_mask_change_no_bit(poison):
    logits = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    masks = words([0, 1, 0b1010, 0b1111110, 0b1000000, 127])
    inside = (masks[:, None] >> torch.arange(7) & 1) == 1
    clean = both(logits, masks, None, 5, False)
    dirty = both(torch.where(inside, logits, poison), masks, None, 5, False)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


def test_nan_inside_the_mask_still_names_allowed_experts():
    """A request whose own numbers are broken must not lead to weights that it may not read."""
    logits = torch.full((3, 7), torch.nan)
    logits[1, 3] = 1.0
    logits[2, :2] = torch.tensor([1.0, -torch.nan])
    masks = words([0b1010, 0b1001010, 0b11])
    weights, experts, want = both(logits, masks, None, 5, False)
    assert torch.equal(experts, want.experts)
    assert torch.equal(weights.isnan(), want.weights.isnan())


def test_logits_masks_and_biases_may_lie_apart():
    logits, masks, bias = torch.randn(5, 8).mT, words([31, 7, 29, 1] * 4), -torch.randn(8).abs()
    weights, experts, want = both(logits, masks[::2], bias[::2], 3, False)
    assert torch.equal(experts, want.experts)
    torch.testing.assert_close(weights, want.weights)


def test_ties_go_to_the_lower_index():
    _, experts, _ = both(torch.zeros(1, 64), words([1 << 63 | 0b1101010]), None, 4, False)
    assert experts.tolist() == [[1, 3, 5, 6]]


@pytest.mark.parametrize(
    ("T", "E", "K", "cells"),
    [
        (1, 1, 1, 4096),
        (40, 7, 5, 4096),
        pytest.param(20, 7, 5, 32, id="several programs count and place"),
        pytest.param(6, 64, 16, 4096, id="64 experts"),
        pytest.param(9, 5, 3, 4096, id="not a power of two"),
    ],
)
def test_pairs_are_grouped_in_the_order_of_tokens(T, E, K, cells, monkeypatch):
    monkeypatch.setattr(grouping, "_CELLS", cells)
    case = layer(T=T, E=E, masks=[(i * 2654435761) % 2**E for i in range(T)], top_k=K)
    experts = case.plan().experts
    groups = grouping.group(experts.to(DEVICE), E)
    pairs = [torch.nonzero(experts.flatten() == e)[:, 0].tolist() for e in range(E)]
    starts = [sum(len(p) for p in pairs[:e]) for e in range(E + 1)]
    assert groups.starts.tolist() == starts
    assert groups.pairs.tolist()[: starts[-1]] == [pair for p in pairs for pair in p]


@some(4)
@given(case=layers())
def test_the_layer_equals_its_twin(shape, case):
    case.check(run(case, shape))


@some(2)
@given(case=layers(T=(2, 3), E=(4,), sizes=(48,)))
def test_excluded_weights_change_no_bit(shape, case):
    assert torch.equal(run(case.without(case.outside()), shape), run(case, shape))


def test_another_tokens_expert_changes_no_bit(shape):
    """Expert 3 is NaN, and some of the batch consult it: the others don't notice."""
    case = layer(T=5, E=4, H=48, I=48, masks=[0b0111, 0b1000, 0b0001, 0b1111, 0b0110], top_k=2)
    case.router_logits[3, 3] = 9.0
    dirty, clean = run(case.without([3]), shape), run(case, shape)
    assert dirty[[1, 3]].isnan().all()
    assert torch.equal(dirty[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("dtype", DTYPES if COMPILED else [torch.float32])
def test_a_token_does_not_see_its_neighbours(shape, dtype):
    """So many that experts have more than one row tile, and that a token stands elsewhere."""
    masks = [3] * 12 + [2, 1, 0, 3, 3, 1]
    case = layer(T=18, E=2, H=48, I=48, dtype=dtype, masks=masks, top_k=2)
    together = run(case, shape)
    for token in (11, 17):
        assert torch.equal(run(case.tokens([token]), shape)[0], together[token])


def test_an_empty_mask_gives_zeros(shape):
    case = layer(T=3, E=4, H=16, I=16, masks=[0, 5, 0], top_k=2)
    out = run(case, shape)
    assert torch.equal(out[[0, 2]], torch.zeros(2, 16))
    case.check(out)


def test_nobody_may_consult_anything(shape):
    case = layer(T=2, E=4, H=16, I=16, masks=[0, 0], top_k=2)
    assert torch.equal(run(case, shape), torch.zeros(2, 16))


def test_no_token_is_no_error(shape):
    case = layer(T=0, E=4, H=16, I=16, masks=[], top_k=2)
    assert run(case, shape).shape == (0, 16)


def test_sixty_four_experts_and_sixteen_slots():
    case = layer(T=2, E=64, H=16, I=16, masks=[2**64 - 1, 1 << 63 | 1], top_k=16)
    case.check(run(case, SHAPES["plain"]))


def test_rows_may_lie_apart():
    case = layer(T=3, E=2, H=16, I=16, top_k=2)
    wide = replace(case, x=torch.cat([case.x, torch.full_like(case.x, torch.nan)], dim=1)[:, :16])
    case.check(run(wide, SHAPES["plain"]))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize(
    ("T", "dtype"),
    [
        (1, torch.bfloat16),
        (20, torch.bfloat16),
        (200, torch.bfloat16),
        (8192, torch.bfloat16),
        (1, torch.float32),
        (8192, torch.float32),
    ],
)
def test_the_shapes_that_rules_choose(T, dtype, capability):
    """Each on a few tokens: how many there are decides nothing but the choice."""
    if COMPILED and capability > torch.cuda.get_device_capability():
        pytest.skip("needs a newer GPU")
    case = layer(T=3, E=3, H=48, I=80, dtype=dtype, masks=[7, 2, 5], top_k=2)
    device = Device("unknown", capability, 4)
    case.check(run(case, choose(device, T=T, E=3, H=48, I=80, dtype=dtype)))


@needs_gpu
@pytest.mark.parametrize("T", [1, 8, 100, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_public_operation_on_a_gpu(T, dtype):
    masks = [(i * 2654435761) % 128 for i in range(T)]
    case = layer(T=T, E=7, H=512, I=352, dtype=dtype, masks=masks)
    on = case.to("cuda")
    out = masked_moe(*on.tensors, **on.options)
    case.check(out.cpu())
    poisoned = case.without(case.outside()).to("cuda")
    assert torch.equal(masked_moe(*poisoned.tensors, **poisoned.options), out)


@needs_gpu
def test_deterministic_results_do_not_depend_on_the_size_of_the_batch():
    case = layer(T=1000, E=7, H=512, I=352, dtype=torch.bfloat16).to("cuda")
    together = masked_moe(*case.tensors, **case.options, deterministic=True)
    for size in (1, 2, 17, 130, 513):
        some_of_them = case.tokens(slice(100, 100 + size))
        apart = masked_moe(*some_of_them.tensors, **case.options, deterministic=True)
        assert torch.equal(apart, together[100 : 100 + size])


@needs_gpu
@pytest.mark.parametrize("T", [4, 700])
def test_a_graph_is_captured_once_and_replayed_with_other_masks(T):
    """Nothing waits for the host, and the grids suit any routing."""
    case = layer(T=T, E=7, H=256, I=352, dtype=torch.bfloat16).to("cuda")
    masked_moe(*case.tensors, **case.options)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = masked_moe(*case.tensors, **case.options)
    for word in (127, 1, 0b1000010, 0):
        case.allowed.fill_(word)
        graph.replay()
        assert torch.equal(out, masked_moe(*case.tensors, **case.options))
