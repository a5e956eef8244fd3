import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet

indices = st.sets(st.integers(0, 63))


@given(indices, indices)
def test_is_a_set(a, b):
    x, y = ExpertSet.of(a), ExpertSet.of(b)
    assert set(x) == a
    assert len(x) == len(a)
    assert set(x & y) == a & b
    assert set(x | y) == a | b
    assert set(x - y) == a - b
    assert (x <= y) == (a <= b)
    assert (x == y) == (a == b)
    assert (x.digest == y.digest) == (a == b)


@given(indices)
def test_the_text_is_canonical(a):
    text = ExpertSet.of(a).text
    assert text == ",".join(map(str, sorted(a)))


@given(st.integers(0, 2**64 - 1))
def test_signed_is_the_same_bits(mask):
    assert ExpertSet(mask).signed % 2**64 == mask
    assert -(2**63) <= ExpertSet(mask).signed < 2**63


@pytest.mark.parametrize("mask", [-1, 1 << 64])
def test_a_mask_has_64_bits(mask):
    with pytest.raises(ValueError, match="64 bits"):
        ExpertSet(mask)


@pytest.mark.parametrize("index", [-1, 64])
def test_an_index_is_in_range(index):
    with pytest.raises(ValueError, match=r"outside 0\.\.63"):
        ExpertSet.of([index])


def test_public_only_is_index_0():
    assert list(PUBLIC_ONLY) == [0]
