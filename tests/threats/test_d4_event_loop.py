"""What vLLM would validate for seconds, on everyone's event loop, is refused by its length."""

import pytest

WORDS = {"bad_words": ["x" * 20_000] * 40}
PATTERN = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"pattern": "a|" * 9000}}}
FORM = {"type": "json_schema", "name": "s", "schema": {"pattern": "a|" * 9000}}


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("chat", WORDS, "bad_words"),
        ("complete", WORDS, "bad_words"),
        ("respond", WORDS, "bad_words"),
        ("chat", {"response_format": PATTERN}, "response_format.json_schema"),
        ("complete", {"response_format": PATTERN}, "response_format.json_schema"),
        ("respond", {"text": {"format": FORM}}, "text.format.schema"),
        ("complete", {"structured_outputs": {"regex": "a|" * 200_000}}, "structured_outputs"),
        ("complete", {"stop": ["x" * 300_000]}, "stop"),
        ("complete", {"repetition_detection": {"max_pattern_size": 9}}, "repetition_detection"),
    ],
)
def test_it_is_refused_before_vllm_sees_it(server, route, fields, param):
    response = getattr(server, route)("alice", **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
