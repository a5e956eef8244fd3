"""What may be asked at once of an engine, by what it runs."""

from types import SimpleNamespace

import pytest

from expertgate.server.room import bound


def config(runs, *, places=None, tokens=None, longest=4096):
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(
            max_num_seqs=runs, max_num_queued_reqs=places, max_num_queued_tokens=tokens
        ),
        model_config=SimpleNamespace(max_model_len=longest),
    )


@pytest.mark.parametrize(("runs", "places"), [(1, 1024), (256, 1024), (1024, 4096)])
def test_more_may_wait_than_the_engine_gets(runs, places):
    found = config(runs)
    turns = bound(found)
    assert found.scheduler_config.max_num_queued_reqs == places
    assert turns.room < places / 2  # which one principal may hold


@pytest.mark.parametrize("places", [0, 8])
def test_another_bound_of_places_holds(places):
    found = config(256, places=places)
    bound(found)
    assert found.scheduler_config.max_num_queued_reqs == places


@pytest.mark.parametrize(
    ("given", "longest", "tokens"),
    [(None, 4096, 1 << 20), (None, 1 << 20, 1 << 22), (10_000, 4096, 10_000)],
)
def test_the_tokens_that_wait_are_bounded_here_and_not_in_vllm(given, longest, tokens):
    found = config(256, tokens=given, longest=longest)
    assert bound(found).most_tokens == tokens
    assert found.scheduler_config.max_num_queued_tokens is None


@pytest.mark.parametrize(("runs", "ahead"), [(8, 32), (256, 32), (1024, 128)])
def test_few_stand_in_the_engines_own_queue(runs, ahead):
    assert bound(config(runs)).most_ahead == ahead
