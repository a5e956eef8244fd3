"""Masked routing equals routing with the rows deleted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertgate.kernels.routing import NO_EXPERT, mask_logits, route, select
from tests.kernels.cases import words

EXPERTS = 7


@st.composite
def routings(draw):
    """Random logits [T, E], a mask for each token (empty and full ones too), and a top_k."""
    T = draw(st.integers(0, 9))
    E = draw(st.sampled_from([1, 2, 7, 33, 64]))
    seed = draw(st.integers(0, 2**31))
    masks = draw(st.lists(st.integers(0, 2**E - 1), min_size=T, max_size=T))
    top_k = draw(st.integers(1, min(E, 16)))
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * 4
    return logits, masks, top_k


@given(routings(), st.booleans())
def test_equals_routing_with_the_rows_deleted(case, renormalize):
    logits, masks, top_k = case
    plan = route(logits, words(masks), top_k=top_k, renormalize=renormalize)
    for token, mask in enumerate(masks):
        kept = [e for e in range(logits.shape[1]) if mask >> e & 1]
        if not kept:
            assert (plan.experts[token] == NO_EXPERT).all()
            assert (plan.weights[token] == 0).all()
            continue
        k = min(top_k, len(kept))
        probabilities = torch.softmax(logits[token, kept], dim=-1)
        top, order = torch.topk(probabilities, k)
        if renormalize:
            top = top / top.sum()
        assert plan.experts[token, :k].tolist() == [kept[i] for i in order]
        assert (plan.experts[token, k:] == NO_EXPERT).all()
        # Two softmax sums over at most 64 terms in another order: a few float32 ulps apart.
        torch.testing.assert_close(plan.weights[token, :k], top, rtol=1e-5, atol=1e-7)
        assert (plan.weights[token, k:] == 0).all()


@given(routings(), st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
def test_logits_outside_the_mask_change_no_bit(case, poison):
    logits, masks, top_k = case
    allowed = words(masks)
    bits = torch.arange(logits.shape[1])
    poisoned = torch.where((allowed[:, None] >> bits & 1) == 1, logits, poison)
    clean = route(logits, allowed, top_k=top_k)
    dirty = route(poisoned, allowed, top_k=top_k)
    assert torch.equal(clean.experts, dirty.experts)
    assert torch.equal(clean.weights, dirty.weights)


def test_ties_go_to_the_lower_index():
    plan = route(torch.zeros(1, EXPERTS), words([0b1101010]), top_k=3)
    assert plan.experts.tolist() == [[1, 3, 5]]


# Zeros of both signs, infinities, and numbers whose bits are next to theirs or to a NaN's.
AWKWARD = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4e38, -3.4e38, torch.inf, -torch.inf]


@given(st.lists(st.sampled_from([*AWKWARD, torch.nan, -torch.nan]), min_size=1, max_size=64))
def test_the_order_is_that_of_a_stable_sort(row):
    logits = torch.tensor([row])
    plan = select(logits, top_k=16)
    want = torch.sort(logits, descending=True, stable=True).indices[:, :16]
    want = want.masked_fill(logits.gather(1, want) == -torch.inf, NO_EXPERT)
    assert plan.experts.tolist() == want.tolist()


def test_weights_that_underflow_keep_their_order():
    # exp(-200) is 0 in float32, so by weight the last three would all tie.
    logits = torch.tensor([[0.0, -300.0, -200.0, -250.0]])
    plan = select(mask_logits(logits, words([0b1111])), top_k=4)
    assert plan.experts.tolist() == [[0, 2, 3, 1]]


def test_only_a_negative_bias_is_added():
    bias = torch.tensor([0.5, -0.5, -2.0])
    masked = mask_logits(torch.ones(1, 4), words([0b1111]), bias)
    assert masked.tolist() == [[1.0, 1.0, 0.5, -1.0]]


def test_the_softmax_runs_before_the_top_k_and_after_the_mask():
    # Masked after the softmax, the two allowed experts would not sum to 1.
    plan = route(torch.tensor([[5.0, 1.0, 0.0]]), words([0b110]), top_k=2)
    assert plan.weights.sum().item() == pytest.approx(1.0)


def test_bit_63_is_an_expert_like_any_other():
    plan = route(torch.zeros(1, 64), words([1 << 63 | 1]), top_k=2)
    assert plan.experts.tolist() == [[0, 63]]


def test_half_precision_logits_are_compared_in_float32():
    logits = torch.randn(5, EXPERTS, dtype=torch.bfloat16)
    plan = route(logits, words([127] * 5), top_k=5)
    assert plan.weights.dtype is torch.float32
    assert plan.experts.dtype is torch.int32
