"""vLLM can put the trace of every routing decision into an answer."""

import json

from tests.support import sse


def keys_of(value):
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys_of(inner)}
    if isinstance(value, list):
        return {key for inner in value for key in keys_of(inner)}
    return set()


def test_no_answer_carries_one(server):
    hidden = {"routed_experts", "kv_transfer_params", "ec_transfer_params", "system_fingerprint"}
    for ask, more, of_stream in (
        (server.chat, {"n": 2}, {"stream_options": {"include_usage": True}}),
        (server.complete, {"n": 2, "temperature": 1}, {"stream_options": {"include_usage": True}}),
        (server.respond, {}, {}),
    ):
        assert not hidden & keys_of(ask("alice", **more).json())
        streamed = sse.data(ask("alice", stream=True, **of_stream))
        found = [json.loads(event) for event in streamed if event != "[DONE]"]
        assert found
        for event in found:
            assert not hidden & keys_of(event)


def test_usage_is_totals_of_the_whole_request(server):
    experts = server.complete("alice", n=2, temperature=1).json()["experts"]
    assert set(experts) == {"effective", "usage", "computed", "cached"}
    for part in experts["usage"].values():
        assert set(part) == {"tokens", "share"}
        assert all(isinstance(value, int | float) for value in part.values())


def test_asking_for_part_of_one_is_refused(server):
    assert server.chat("alice", routed_experts_prompt_start=1).status_code == 400
