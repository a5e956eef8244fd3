"""Values that vLLM leaves to its sampler, which dies of them, and all requests with it."""

import pytest


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2, "temperature": 1, "seed": (1 << 63) - 1},
        {"allowed_token_ids": [1] * 1025},
        {"logit_bias": {str(i): 1 for i in range(1025)}},
        {"stop_token_ids": [1] * 129, "min_tokens": 1},
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
    ],
    ids=lambda fields: ",".join(fields),
)
def test_what_would_kill_the_engine_is_refused(server, fields):
    response = server.complete("alice", **fields)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request"
    assert server.complete("alice").status_code == 200
