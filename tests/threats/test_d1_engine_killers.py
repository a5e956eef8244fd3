"""Values that vLLM leaves to its sampler, which dies of them, and all requests with it."""

import pytest


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2, "temperature": 1, "seed": (1 << 63) - 1},
        {"allowed_token_ids": [1] * 1025},
        {"logit_bias": {str(i): 1 for i in range(1025)}},
        {"stop_token_ids": [1] * 121, "min_tokens": 1},
        {"bad_words": ["abc"] * 400},
        {"stop_token_ids": [320], "min_tokens": 1},
        {"allowed_token_ids": [320]},
        {"logit_bias": {"320": 1}},
        {"logit_bias": {"x": 1}},
        {"prompt": [320]},
        {"prompt": [-1]},
        {"prompt": [1 << 70]},
        {"top_k": 1 << 40},
        {"top_k": -5},
        {"min_tokens": 1 << 70},
        {"seed": -(1 << 70)},
        {"repetition_penalty": 0},
        {"temperature": 1e300},
        {"truncate_prompt_tokens": -7},
        {"logprobs": -3},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}, "n": 0},
        # The same in other spellings, which vLLM's models would read as numbers.
        {"n": "1000"},
        {"n": 16384.0},
        {"n": "2", "temperature": 1, "seed": (1 << 63) - 1},
        {"n": 2, "temperature": 1, "seed": str((1 << 63) - 1)},
        {"max_tokens": "99999999999"},
        {"top_k": "99999999999999999999", "temperature": 1, "max_tokens": 1},
        {"top_k": 1e30},
        {"min_tokens": "1", "stop_token_ids": ["99999999999999999999"]},
        {"logit_bias": {"1": "nan"}},
        {"prompt": ["a"] * 33, "n": 2},
        {"prompt": [["99999999999999999999"]]},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_what_would_kill_the_engine_is_refused(server, fields):
    response = server.complete("alice", **fields)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request"
    assert server.complete("alice").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"hi","temperature":1e400}',
        b'{"prompt":"hi","logit_bias":{"1":1e400}}',
        b'{"prompt":"hi","response_format":{"type":"json_schema","json_schema":'
        b'{"name":"s","schema":{"const":1' + b"0" * 300 + b"}}}}",
    ],
    ids=["temperature", "logit_bias", "const"],
)
def test_numbers_that_no_message_to_the_engine_can_hold_are_refused(server, body):
    """vLLM would take a place in its queue before it finds out, and never give it back."""
    assert server.post("/v1/completions", body).status_code == 400
    assert server.complete("alice").status_code == 200
