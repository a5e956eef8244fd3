"""What a response's input may hold. Of what fits nothing, vLLM makes errors of every kind."""

import json

import pytest

from expertgate.server.errors import ApiError
from expertgate.server.response_items import ROLES, STATUSES
from expertgate.server.responses import ResponsesRequest
from expertgate.server.schemas import read

USER = {"role": "user", "content": [{"type": "input_text", "text": "a"}]}
OWN = {
    "type": "message",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "a", "annotations": [], "logprobs": None}],
}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "1", "output": "a"}
THOUGHT = {
    "type": "reasoning",
    "summary": [{"type": "summary_text", "text": "a"}],
    "content": [{"type": "reasoning_text", "text": "a"}],
}
SAID = {"type": "message", "role": "assistant", "content": "a"}
ITEMS = (USER, OWN, SAID, CALL, OUTPUT, THOUGHT)


def respond(*items, **fields):
    return read(ResponsesRequest, json.dumps({"input": list(items), **fields}).encode())


@pytest.fixture
def refused(monkeypatch):
    """What is wrong with a body, which no model of vLLM's may see."""

    def unread(*_, **__):
        raise AssertionError("it was read")

    monkeypatch.setattr(ResponsesRequest, "model_validate", unread)

    def refused(*items, **fields):
        with pytest.raises(ApiError) as error:
            respond(*items, **fields)
        assert (error.value.status, error.value.code) == (400, "invalid_request")
        return error.value

    return refused


def with_part(item, part):
    return {**item, "content": [{**item["content"][0], **part}]}


@pytest.mark.parametrize("junk", [{}, 1, [], "a"], ids=str)
@pytest.mark.parametrize("name", ["annotations", "logprobs"])
def test_what_an_answer_has_beside_its_text_comes_back_unread(name, junk):
    found = respond(with_part(OWN, {name: [junk] * 10_000})).input[0]
    assert found.content[0].text == "a"
    assert not found.content[0].annotations


@pytest.mark.parametrize(
    ("item", "place"),
    [
        ({"role": "bogus", "content": "a"}, "role"),
        ({"role": "tool", "content": "a"}, "role"),
        ({**OWN, "status": "done"}, "status"),
        ({**CALL, "status": 1}, "status"),
        ({**CALL, "id": []}, "id"),
        ({**THOUGHT, "encrypted_content": {}}, "encrypted_content"),
        ({**THOUGHT, "summary": [{}]}, "summary[0]"),
        ({**THOUGHT, "summary": [{"type": "text", "text": "a"}]}, "summary[0]"),
        ({**THOUGHT, "content": [{"type": "reasoning_text"}]}, "content[0].text"),
        ({**THOUGHT, "content": "a"}, "content"),
        (with_part(USER, {"annotations": [{}]}), "content[0].annotations"),
        (with_part(USER, {"logprobs": None}), "content[0].logprobs"),
        (with_part(OWN, {"annotations": {}}), "content[0].annotations"),
        (with_part(OWN, {"logprobs": "a"}), "content[0].logprobs"),
        ({**CALL, "arguments": "[" * 200_000}, "arguments"),
    ],
    ids=str,
)
def test_an_item_that_fits_nothing_is_refused_before_a_model_reads_it(refused, item, place):
    assert refused(*[item] * 500).param == f"input[0].{place}"


VALUES = (
    *STATUSES,
    *ROLES,
    None,
    1,
    True,
    1.5,
    "a",
    [],
    {},
    [{}],
    [1],
    ["a"],
    [{"type": "a"}],
    {"a": 1},
)


def fits(item):
    """Whether it is taken, or refused here, and not by a model."""
    try:
        respond(item)
    except ApiError as error:
        return error.param.startswith("input[0]")
    return True


@pytest.mark.parametrize("item", ITEMS, ids=str)
def test_what_is_let_through_fits(item):
    for name in ResponsesRequest.nested["input[]"]:
        for value in VALUES:
            assert fits({**item, name: value}), (name, value)


def test_a_part_says_no_more_than_it_may():
    for item in (USER, OWN):
        for name in ResponsesRequest.nested["input[].content[]"]:
            for value in VALUES:
                assert fits(with_part(item, {name: value})), (name, value)


def test_null_is_as_if_it_were_not_there():
    items = [{**item, "id": None, "status": None} for item in ITEMS]
    assert len(respond(*items).input) == len(ITEMS)
    untyped = {name: value for name, value in OWN.items() if name != "type"}
    assert respond(untyped).input[0].content[0].text == "a"


@pytest.mark.parametrize("name", ["async", "caller", "created_by", "namespace", "phase"])
def test_what_openai_may_say_of_an_item_is_null_or_refused(name):
    assert respond(*[{**item, name: None} for item in ITEMS])
    with pytest.raises(ApiError) as error:
        respond({**OWN, name: "a"})
    assert error.value.param == f"input[0].{name}"


def test_an_item_by_its_id_is_told_that_nothing_is_stored(refused):
    error = refused(USER, {"type": "item_reference", "id": "msg_1"})
    assert error.param == "input[1].type"
    assert "nothing is stored here" in error.message


def test_long_lists_beside_the_input_are_refused_before_a_model_reads_them(refused):
    assert refused(USER, include=[1] * 100_000).param == "include"
    assert refused(USER, metadata={str(n): "a" for n in range(17)}).param == "metadata"
    for metadata in ({"a": 1}, [], "a"):
        assert refused(USER, metadata=metadata).param == "metadata"


def test_as_much_metadata_as_openai_takes():
    assert respond(USER, metadata={str(n): "a" * 512 for n in range(16)})
    assert respond(USER, metadata=None, include=["message.output_text.logprobs"])
