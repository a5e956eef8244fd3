"""The buffer of masks: what each token gets, and that nothing stays behind."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertgate.model.masks import EXTRA_ARG, TokenMasks, requested
from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet

PUBLIC = PUBLIC_ONLY.signed
SIZE = 40

words = st.integers(-(2**63), 2**63 - 1)
steps = st.lists(st.tuples(words, st.integers(0, 5)), max_size=6)


def arm(masks, step, padding=0):
    lengths = [length for _, length in step]
    masks.arm(
        torch.tensor([word for word, _ in step], dtype=torch.int64),
        torch.tensor([0, *lengths]).cumsum(0),
        sum(lengths) + padding,
    )


def expected(step):
    tokens = [word for word, length in step for _ in range(length)]
    return tokens + [PUBLIC] * (SIZE - len(tokens))


@given(st.lists(st.tuples(steps, st.integers(0, 5)), min_size=1, max_size=4))
def test_each_token_gets_its_requests_mask_and_every_other_word_is_at_rest(several):
    """Step after step on one buffer, so that what an earlier one left would show."""
    masks = TokenMasks(SIZE, torch.device("cpu"))
    for step, padding in several:
        arm(masks, step, padding)
        assert masks.words.tolist() == expected(step)


@given(st.lists(st.tuples(steps, st.integers(0, 5)), min_size=1, max_size=4))
def test_masks_by_token_are_the_same(several):
    masks = TokenMasks(SIZE, torch.device("cpu"))
    for step, padding in several:
        tokens = [word for word, length in step for _ in range(length)]
        masks.arm_tokens(torch.tensor(tokens, dtype=torch.int64), len(tokens) + padding)
        assert masks.count == len(tokens)
        assert masks.words.tolist() == expected(step)


@given(steps)
def test_rest_closes_everything(step):
    masks = TokenMasks(SIZE, torch.device("cpu"))
    arm(masks, step)
    masks.rest()
    assert masks.words.tolist() == [PUBLIC] * SIZE


def test_profiling_leaves_nothing_open():
    masks = TokenMasks(SIZE, torch.device("cpu"))
    masks.open_all(7)
    assert masks.words.tolist() == [127] * SIZE
    masks.rest()
    assert masks.words.tolist() == [PUBLIC] * SIZE


def test_the_buffer_keeps_its_address():
    """A captured CUDA graph reads this address for ever."""
    masks = TokenMasks(SIZE, torch.device("cpu"))
    address = masks.words.data_ptr()
    arm(masks, [(5, 3)])
    masks.open_all(7)
    masks.rest()
    assert masks.words.data_ptr() == address


def test_a_step_larger_than_the_buffer_is_an_error():
    masks = TokenMasks(4, torch.device("cpu"))
    with pytest.raises(ValueError, match="5 tokens scheduled, but masks for 4"):
        arm(masks, [(1, 5)])


@given(st.integers(0, 2**64 - 1))
def test_what_the_guard_wrote_is_read(mask):
    assert requested({EXTRA_ARG: mask}) == ExpertSet(mask)


@pytest.mark.parametrize(
    "extra_args",
    [
        None,
        {},
        {"other": 127},
        {EXTRA_ARG: None},
        {EXTRA_ARG: "127"},
        {EXTRA_ARG: 127.0},
        {EXTRA_ARG: True},
        {EXTRA_ARG: -1},
        {EXTRA_ARG: 1 << 64},
        {EXTRA_ARG: [0, 1, 2]},
    ],
)
def test_anything_else_is_public_only(extra_args):
    assert requested(extra_args) == PUBLIC_ONLY
