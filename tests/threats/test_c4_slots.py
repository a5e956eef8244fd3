"""c4: slots are freed by id and taken by index, and writes wait for a step with new requests."""

import random

import pytest

from expertgate.policies.expert_set import ExpertSet
from tests.support.model_state import PUBLIC, SLOTS, batch, new_state, request, rows, run, run_dummy


@pytest.fixture
def state():
    return new_state()


def test_a_slot_that_is_freed_and_taken_in_one_step_has_the_takers_mask(state):
    """Both writes are staged for the same step, and must not race."""
    state.add_request(2, request("a", 127))
    run(state, batch([2], [1]))
    state.remove_request("a")
    state.add_request(2, request("b", 0b11))
    assert run(state, batch([2], [1])) == rows((0b11, 1))


def test_a_request_without_a_mask_does_not_inherit_its_slots(state):
    state.add_request(2, request("a", 127))
    run(state, batch([2], [1]))
    state.remove_request("a")
    state.add_request(2, request("b", None))
    assert run(state, batch([2], [1])) == rows((PUBLIC, 1))


def test_nothing_stays_of_who_has_left(state):
    state.add_request(2, request("a", 127, "account"))
    run(state, batch([2], [1]))
    state.remove_request("a")
    state.add_request(0, request("b", 0b11))
    run(state, batch([0], [1]))
    assert state.slots.tolist() == [0b11] + [PUBLIC] * (SLOTS - 1)
    assert list(state._account_of) == list(state._slot_of) == ["b"]


def test_removing_is_idempotent_and_unknown_ids_are_ignored(state):
    """The runner removes every request before it adds it."""
    state.remove_request("never seen")
    state.add_request(1, request("a", 127))
    state.remove_request("a")
    state.remove_request("a")
    state.add_request(1, request("b", 5))
    assert run(state, batch([1], [1])) == rows((5, 1))


def test_slots_that_churn_a_thousand_times(state):
    """Add, abort, preempt, reuse, with dummies in between, against a plain dictionary."""
    chance = random.Random(0)
    live: dict[str, tuple[int, int]] = {}
    for turn in range(1000):
        for name in [n for n in live if chance.random() < 0.3]:
            del live[name]
            state.remove_request(name)
        free = [s for s in range(SLOTS) if s not in {slot for slot, _ in live.values()}]
        for slot in chance.sample(free, chance.randint(0, len(free))):
            name, mask = f"{turn}-{slot}", chance.choice([None, 1, 127, 0b1010, 1 << 63])
            live[name] = (slot, ExpertSet(mask or 1).signed)
            state.add_request(slot, request(name, mask))
        if chance.random() < 0.2:
            assert run_dummy(state, batch(list(range(SLOTS)), [1] * SLOTS)) == rows()
        order = chance.sample(sorted(live), len(live))
        lengths = [chance.randint(1, 7) for _ in order]
        got = run(state, batch([live[n][0] for n in order], lengths))
        assert got == rows(*((live[n][1], k) for n, k in zip(order, lengths, strict=True)))
