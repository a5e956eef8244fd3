"""vLLM's bodies take any field, so a misspelt `experts` would mean all that are granted."""

import pytest


@pytest.mark.parametrize("name", ["expert", "Experts", "EXPERTS", "extra_body", "experts "])
def test_a_misspelt_field_is_refused(server, name):
    for ask in server.asks:
        response = ask("alice", **{name: ["public"]})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi", "mask": 1}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": "hi", "mask": 1}]}),
        ("/v1/responses", {"input": "hi", "reasoning": {"mask": 1}}),
        ("/v1/responses", {"input": "hi", "text": {"mask": 1}}),
        ("/v1/responses", {"input": "hi", "tools": [{"type": "function", "mask": 1}]}),
        ("/tokenize", {"prompt": "hi", "mask": 1}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi", "mask": 1}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi"}], "chat_template": "x"}),
        ("/detokenize", {"tokens": [1], "mask": 1}),
    ],
)
def test_an_unknown_field_is_refused_however_deep_it_stands(server, path, body):
    response = server.post(path, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].endswith(("mask", "chat_template"))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/batch",
        "/v1/chat/completions/render",
        "/v1/responses/render",
        "/v1/responses/input_tokens",
        "/v1/messages",
        "/v1/embeddings",
        "/v1/load_lora_adapter",
        "/inference/v1/generate",
        "/tokenizer_info",
        "/tokenize/batch",
        "/pooling",
        "/score",
        "/collective_rpc",
        "/sleep",
        "/reset_prefix_cache",
        "/start_profile",
        "/scale_elastic_ep",
        "/update_weights",
        "/metrics",
        "/v1/chat/completions/",
    ],
)
def test_what_is_not_listed_does_not_exist(server, path):
    body = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "input": "hi"}
    response = server.post(path, body)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
