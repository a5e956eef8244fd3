"""The masks of Model Runner V2."""

import pytest

from expertgate.policies.expert_set import ExpertSet
from tests.support.model_state import PUBLIC, batch, new_state, request, rows, run


@pytest.fixture
def state():
    return new_state()


def test_each_token_gets_the_mask_of_its_slot(state):
    state.add_request(3, request("a", 0b101))
    state.add_request(0, request("b", 1 << 63 | 1))
    state.add_request(5, request("c", None))
    got = run(state, batch([5, 0, 3], [2, 3, 1], padding=2))
    assert got == rows((PUBLIC, 2), (ExpertSet(1 << 63 | 1).signed, 3), (0b101, 1))


def test_what_the_model_keeps_is_asked_before_anything_is_compiled(state):
    """Until Python 3.12 a cached property has a lock, at which torch's own compilation ends."""
    assert vars(state.model)["plain_on_cpu"] is False
