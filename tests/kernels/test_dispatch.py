"""The public operation on a CPU, by vLLM's kernel and by the loop, against the loop in float64."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertgate.kernels import InputError, Packed, cpu, mask_logits, masked_moe, pack, route
from tests.kernels.cases import Case, layer, layers, words

every_example_alike = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=["vLLM's kernel", "the loop"])
def run(request):
    """Both ways to run on a CPU; sizes that vLLM's kernel doesn't take go to the loop anyway."""
    pytest.importorskip("vllm._custom_ops")
    if request.param == "the loop":
        return lambda case, **options: masked_moe(*case.tensors, **case.options, **options)
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        pytest.skip("this vLLM has no CPU kernels")

    def packed(case: Case, **options):
        w_gate_up, w_down = pack(case.w_gate_up), pack(case.w_down)
        if not isinstance(w_gate_up, Packed) or not isinstance(w_down, Packed):
            w_gate_up, w_down = case.w_gate_up, case.w_down
        return masked_moe(
            case.x,
            case.router_logits,
            w_gate_up,
            w_down,
            case.allowed,
            **case.options,
            **options,
        )

    return packed


@every_example_alike
@given(case=layers(T=(0, 9), E=(1, 2, 7), sizes=(16, 32, 64)))
def test_equals_the_loop(run, case):
    case.check(run(case))


@every_example_alike
@given(case=layers(T=(1, 9), E=(2, 7), sizes=(32, 64)))
def test_excluded_weights_change_no_bit(run, case):
    assert torch.equal(run(case.without(case.outside())), run(case))


@every_example_alike
@given(case=layers(T=(2, 9), E=(2, 7), sizes=(32, 64)), chosen=st.integers(0, 8))
def test_a_token_does_not_see_its_neighbours(run, case, chosen):
    token = chosen % len(case.x)
    alone = run(case.tokens([token]), deterministic=True)
    assert torch.equal(run(case, deterministic=True)[token : token + 1], alone)


def test_sixty_four_experts_and_sixteen_slots(run):
    case = layer(T=3, E=64, H=32, I=32, masks=[2**64 - 1, 1 << 63, 1 << 63 | 1], top_k=16)
    case.check(run(case))


def test_an_empty_mask_gives_zeros(run):
    case = layer(T=4, E=7, masks=[0, 127, 0, 1])
    out = run(case)
    assert torch.equal(out[[0, 2]], torch.zeros(2, out.shape[1]))
    case.check(out)


def test_an_empty_slot_is_not_filled_by_the_public_expert(run):
    """It may be excluded as others are; here both tokens go to the kernel in one call."""
    case = layer(T=2, E=3, H=32, I=32, masks=[0b010, 0b110])
    assert torch.equal(run(case.without([0])), run(case))


def test_rows_may_lie_anywhere(run):
    """By its column, as one of two halves, or as every second row: the same bits."""
    case = layer(T=5, E=7, H=32, I=32, masks=[127] * 5)
    wanted = run(case)
    for views in (
        [x.mT.contiguous().mT for x in (case.x, case.router_logits)],
        [torch.cat([x, x], 1)[:, x.shape[1] :] for x in (case.x, case.router_logits)],
        [x.repeat_interleave(2, 0)[::2] for x in (case.x, case.router_logits)],
    ):
        x, router_logits = views
        assert torch.equal(run(replace(case, x=x, router_logits=router_logits)), wanted)


def test_more_pairs_than_one_call_takes(run, monkeypatch):
    monkeypatch.setattr(cpu, "_MAX_PAIRS_A_CALL", 8)
    case = layer(T=11, E=7, H=32, I=32)
    case.check(run(case))
    plan = route(case.router_logits, case.allowed, **case.options)

    def counted(x, _, experts):
        assert experts.numel() <= 8
        return torch.zeros_like(x)

    for rows in range(1, 12):
        first = type(plan)(*(whole[:rows] for whole in plan))
        assert len(cpu.run_used(case.x[:rows], first, counted)) == rows


@every_example_alike
@given(case=layers(T=(2, 12), E=(4, 7), sizes=(32, 64)))
def test_no_bit_depends_on_which_tokens_share_a_call(case):
    """Reading weights for nothing, every count of slots has its own call; for a fortune, one."""
    pytest.importorskip("vllm._custom_ops")
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        pytest.skip("this vLLM has no CPU kernels")
    w_gate_up, w_down = pack(case.w_gate_up), pack(case.w_down)
    plan = route(case.router_logits, case.allowed, **case.options)
    outs, calls = [], []
    for price in (0, 1 << 40):
        seen: list[list[int]] = []

        def run(x, weights, experts, seen=seen):
            assert (experts >= 0).all()
            seen.append(list(experts.shape))
            return cpu.run_packed(
                w_gate_up.values, w_down.values, w_down.instructions, x, weights, experts
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "_READ_COST", price)
            patch.setattr(cpu, "_CALL_COST", price)
            outs.append(cpu.run_used(case.x, plan, run))
        calls.append(seen)
    assert torch.equal(*outs)
    case.check(outs[0])
    counts = (plan.experts >= 0).sum(1)
    assert len(calls[0]) == len(set(counts.tolist()) - {0})
    assert sum(rows * slots for rows, slots in calls[0]) == counts.sum()
    assert len(calls[1]) <= 1


@pytest.mark.parametrize(
    ("tokens", "experts", "calls"),
    [
        ([0, 0, 9], [0, 0, 0b111], [range(2, 3)]),
        ([3, 0, 0], [0, 0, 0], []),
        # Public alone beside all seven: to fill three slots is cheaper than to read it twice.
        ([0, 3, 0, 4], [0, 1, 0, 127], [range(1, 4)]),
        ([0, 300, 0, 4], [0, 1, 0, 127], [range(1, 2), range(3, 4)]),
        # Those in the middle go with whom they cost least.
        ([0, 300, 2, 300], [0, 1, 3, 127], [range(1, 2), range(2, 4)]),
        # The last of 64 experts is the sign.
        ([0, 1, 1], [0, -(1 << 63), 1], [range(1, 3)]),
    ],
)
def test_tokens_share_a_call_where_it_is_cheaper(tokens, experts, calls):
    assert cpu._together(tokens, experts) == calls


def test_vllms_kernel_takes_what_is_packed():
    """So that the tests above have tried it."""
    pytest.importorskip("vllm._custom_ops")
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        pytest.skip("this vLLM has no CPU kernels")
    assert isinstance(pack(torch.zeros(2, 32, 64)), Packed)
    assert not isinstance(pack(torch.zeros(2, 32, 48)), Packed)


def test_vllms_kernel_may_be_the_first_in_a_process():
    """Linux ends a process that uses AMX without having asked for it, as PyTorch's own may have."""
    pytest.importorskip("vllm._custom_ops")
    code = """
import torch, vllm._custom_ops
from expertgate.kernels import masked_moe, pack
w_gate_up, w_down = (pack(torch.ones(2, *shape).bfloat16()) for shape in ((64, 32), (32, 32)))
x = torch.ones(1, 32, dtype=torch.bfloat16)
masked_moe(x, torch.zeros(1, 2), w_gate_up, w_down, torch.tensor([3]), top_k=2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_half_packed_weights_are_refused():
    w_down = Packed(torch.zeros(4, 32, 48), "vec")
    with pytest.raises(InputError, match="pack both"):
        masked_moe(**change(w_down=w_down))


def test_masked_logits_route_as_their_masks_do():
    case = layer(T=9, E=7, masks=[0, 1, 2, 3, 64, 127, 100, 9, 90])
    want = route(case.router_logits, case.allowed, top_k=5)
    got = route(mask_logits(case.router_logits, case.allowed), None, top_k=5)
    assert torch.equal(got.experts, want.experts)
    assert torch.equal(got.weights, want.weights)


def test_masked_logits_have_their_bias_already():
    """On a CPU it would have been passed over, and on a GPU added once more."""
    with pytest.raises(InputError, match="router_bias is given without allowed"):
        route(torch.zeros(1, 3), None, top_k=2, router_bias=torch.tensor([-5.0, -1.0]))


def test_empty_slots_name_what_is_asked_for():
    case = layer(T=3, E=7, masks=[0, 1, 127])
    plan = route(case.router_logits, case.allowed, top_k=2, empty=7)
    assert plan.experts[:2].tolist() == [[7, 7], [0, 7]]
    assert plan.experts[2].max() < 7


def test_masked_logits_are_copied_where_that_is_asked_for():
    case = layer(T=9, E=7, masks=[0, 1, 2, 3, 64, 127, 100, 9, 90])
    ledger = torch.full((12, 7), torch.nan)
    masked = mask_logits(case.router_logits, case.allowed, copy=ledger[:9])
    assert torch.equal(ledger[:9], masked)
    assert torch.equal(masked, mask_logits(case.router_logits, case.allowed))
    assert ledger[9:].isnan().all()


@pytest.mark.parametrize(
    ("copy", "said"),
    [
        (torch.zeros(8, 7), r"copy is \[8, 7\] float32; it must be \[9, 7\] float32"),
        (torch.zeros(9, 7).half(), "copy is .* float16; it must be .* float32"),
        (torch.zeros(7, 9).mT, "copy is .* contiguous"),
        (torch.zeros(9, 7, device="meta"), "copy is on meta; the rest is on"),
    ],
)
def test_a_copy_that_does_not_fit_is_refused(copy, said):
    case = layer(T=9, E=7, masks=[127] * 9)
    with pytest.raises(InputError, match=said):
        mask_logits(case.router_logits, case.allowed, copy=copy)


def change(**arguments):
    """A good call with some arguments changed."""
    case = layer(T=3, E=4, H=32, I=48)
    good = {
        "x": case.x,
        "router_logits": case.router_logits,
        "w_gate_up": case.w_gate_up,
        "w_down": case.w_down,
        "allowed": case.allowed,
        "top_k": 2,
    }
    return good | arguments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"x": torch.zeros(2, 32)}, r"x is \[2, 32\] float32; it must be \[T = 3, H\]"),
        ({"x": torch.zeros(3, 32).double()}, "x is .* float64; it must be bfloat16, float16 or"),
        ({"router_logits": torch.zeros(3, 0)}, "router_logits has 0 experts; it may have 1 to 64"),
        ({"router_logits": torch.zeros(3, 65)}, "router_logits has 65 experts"),
        ({"router_logits": torch.zeros(3)}, r"router_logits is \[3\] float32; it must be \[T, E\]"),
        ({"router_logits": torch.zeros(3, 4).int()}, "router_logits .* must be floating point"),
        ({"w_gate_up": torch.zeros(4, 48, 32)}, r"must be \[4, 96, 32\] = \[E, 2I, H\]"),
        ({"w_gate_up": torch.zeros(4, 96, 32).half()}, "w_gate_up is .* torch.float32, as x is"),
        ({"w_gate_up": torch.zeros(4, 32, 96).mT}, "w_gate_up is .* must be contiguous"),
        ({"w_down": torch.zeros(3, 32, 48)}, r"w_down .* \[E = 4, H = 32, I = 48\]|w_down"),
        ({"allowed": torch.zeros(2).long()}, r"allowed is \[2\] int64; it must be \[T = 3\]"),
        ({"allowed": torch.zeros(3).int()}, "allowed is .* int32; it must be int64"),
        ({"router_bias": torch.zeros(4)}, r"router_bias is \[4\] float32; it must be \[E-1 = 3\]"),
        ({"top_k": 0}, "top_k is 0; it may be 1 to 16"),
        ({"top_k": 17}, "top_k is 17"),
        ({"allowed": torch.zeros(3, device="meta").long()}, "allowed is on meta; the rest is on"),
        (
            {"w_down": torch.zeros(4, 32, 40), "w_gate_up": torch.zeros(4, 80, 32)},
            "I is 40; it must be a multiple of 16",
        ),
        (
            {
                "x": torch.zeros(3, 24),
                "w_down": torch.zeros(4, 24, 48),
                "w_gate_up": torch.zeros(4, 96, 24),
            },
            "H is 24; it must be a multiple of 16",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, said):
    masked_moe(**change())
    with pytest.raises(InputError, match=said):
        masked_moe(**change(**arguments))


def test_a_mask_is_read_as_signed_and_unsigned_alike():
    plan = route(torch.zeros(2, 64), words([1 << 63, (1 << 63) | 3]), top_k=3)
    assert plan.experts.tolist() == [[63, -1, -1], [0, 1, 63]]
