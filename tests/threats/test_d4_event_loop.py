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
        ("respond", {"input": [{"role": "nobody", "content": "a"}] * 1000}, "input[0].role"),
        ("complete", {"repetition_detection": {"max_pattern_size": 9}}, "repetition_detection"),
    ],
)
def test_it_is_refused_before_vllm_sees_it(server, route, fields, param):
    response = getattr(server, route)("alice", **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [[5] * 60] * 9, "prompt_logprobs": 20, "n": 3},
        {"prompt": [[5] * 60] * 27, "prompt_logprobs": 20},
        {"prompt": [5] * 60, "prompt_logprobs": 20, "n": 27},
        {"prompt": [5] * 60, "echo": True, "logprobs": 20, "n": 27},
    ],
)
def test_nor_does_it_make_text_of_each_prompt_token_for_each_choice(server, fields):
    assert 60 * 21 * 27 > 1 << 15
    response = server.complete("alice", **{"max_tokens": 1, "temperature": 1, **fields})
    assert response.status_code == 400, response.text
    assert "at most 32768" in response.json()["error"]["message"]


def test_what_can_be_told_along_prompts_is(server):
    body = {
        "prompt": [[5] * 60] * 5,
        "prompt_logprobs": 20,
        "n": 5,
        "temperature": 1,
        "max_tokens": 1,
    }
    answer = server.complete("alice", **body)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [60] * 25
