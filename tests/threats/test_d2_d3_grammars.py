"""Schemas that cost everyone, or that only the engine finds to be impossible: each is a 400."""

import pytest

RECURSIVE = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}


def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


BOUNDED = [
    {"type": "array", "minItems": 10**6},
    {"type": "string", "minLength": -5},
    {"type": "string", "pattern": "\\p{L}"},
    {"type": "string", "pattern": "((a*)*)*"},
    {"patternProperties": {"(": {}}},
    {"properties": {f"p{n}": {"type": "string"} for n in range(5000)}},
    {"anyOf": [{"type": "string", "maxLength": 100 + n} for n in range(250)]},
]
"""What would be compiled for seconds, or would slow down every step."""
IMPOSSIBLE = [
    {"$ref": "#"},
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    RECURSIVE,
    {"type": "string", "minLength": 5, "maxLength": 4},
    {"$ref": "#/nowhere"},
]


def refused(server, schema, stream):
    response = server.chat("alice", response_format=form(schema), stream=stream)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "invalid_request"
    return error


@pytest.mark.parametrize("schema", BOUNDED, ids=lambda schema: str(schema)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_costs_everyone_is_refused_by_its_looks(server, schema, stream):
    """What names its place is ours: no grammar was made of it, and nobody waited for one."""
    assert refused(server, schema, stream)["param"] == "response_format.json_schema"


@pytest.mark.parametrize("schema", IMPOSSIBLE, ids=lambda schema: str(schema)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_used_is_refused_and_others_go_on(server, schema, stream):
    refused(server, schema, stream)
    assert server.complete("bob").status_code == 200


def test_tokens_that_the_schema_cannot_have_are_refused(server):
    response = server.chat("alice", response_format=form({"const": 1}), allowed_token_ids=[65])
    assert response.status_code == 400


def test_a_schema_of_every_day_is_followed(server):
    schema = {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"]}
    response = server.chat(
        "alice", response_format={**form({**schema, "additionalProperties": False})}, max_tokens=60
    )
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"].lstrip().startswith("{")
