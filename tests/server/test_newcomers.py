"""The order in which a step's tokens go out."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from expertgate.server.newcomers import first_tokens_first


def engine(states, *ids):
    async def get_output_async():
        return EngineCoreOutputs(outputs=[EngineCoreOutput(each, [1]) for each in ids])

    made = SimpleNamespace(
        engine_core=SimpleNamespace(get_output_async=get_output_async),
        output_processor=SimpleNamespace(request_states=states),
    )
    first_tokens_first(made)
    return made


def order(engine):
    return [o.request_id for o in asyncio.run(engine.engine_core.get_output_async()).outputs]


@pytest.fixture
def states():
    return {each: SimpleNamespace(is_prefilling=each in "cx") for each in "abcdx"}


def test_first_tokens_come_first_and_the_rest_as_it_was(states):
    assert order(engine(states, "a", "b", "c", "d", "x")) == ["c", "x", "a", "b", "d"]


def test_what_nobody_knows_any_more_stays_for_vllm_to_throw_away(states):
    assert order(engine(states, "gone", "a", "c")) == ["c", "gone", "a"]


def test_steps_with_no_tokens_pass(states):
    assert order(engine(states)) == []


def test_who_has_had_its_first_is_no_newcomer(states):
    made = engine(states, "a", "c")
    assert order(made) == ["c", "a"]
    states["c"].is_prefilling = False
    assert order(made) == ["a", "c"]
