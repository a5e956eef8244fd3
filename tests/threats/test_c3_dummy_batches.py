"""c3: profiling and idle ranks run dummy batches that name the slots of live requests."""

import pytest

from tests.support.model_state import batch, new_state, request, rows, run, run_dummy


@pytest.fixture
def state():
    return new_state()


def test_a_dummy_batch_that_names_live_slots_runs_at_rest(state):
    state.add_request(0, request("a", 127))
    run(state, batch([0], [5]))
    assert run_dummy(state, batch([0], [5])) == rows()
    assert run(state, batch([0], [1])) == rows((127, 1))


def test_graph_capture_runs_at_rest(state):
    state.add_request(0, request("a", 127))
    run(state, batch([0], [5]))
    state.prepare_dummy_inputs(1, 8)
    assert state.model.masks.words.tolist() == rows()


def test_the_same_batch_object_is_armed_once(state):
    """A dummy run that reused the object of a real one must not inherit its masks."""
    state.add_request(0, request("a", 127))
    made = batch([0], [5])
    run(state, made)
    assert run_dummy(state, made) == rows()
