"""While an answer with log probabilities is put together, others are served."""

import asyncio
import threading

import httpx
import pytest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from expertgate.server import answers, building

ASKED = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}],
        "logprobs": True,
        "top_logprobs": 20,
        "n": 3,
        "temperature": 1,
    },
    "/v1/completions": {"prompt": ["hi", "ho"], "logprobs": 20, "n": 2, "temperature": 1},
    "/v1/responses": {
        "input": "hi",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 20,
    },
}
EXTRA = ("logprobs", "top_logprobs", "include")
BUILT = {
    "/v1/chat/completions": (OpenAIServingChat, "_create_chat_logprobs", 3),
    "/v1/completions": (OpenAIServingCompletion, "_create_completion_logprobs", 4),
    "/v1/responses": (OpenAIServingResponses, "_create_response_logprobs", 1),
}


def ask(coreless, path, **more):
    body = {**ASKED[path], **more}
    return httpx.post(coreless.url + path, json=body, headers=coreless.headers(), timeout=60)


@pytest.fixture
def watched(coreless, monkeypatch):
    """Has each call of a function answer another request before it goes on."""
    calls = []

    def watch(holder, name):
        original = getattr(holder, name)

        def call(*args, **kwargs):
            health = []
            asking = threading.Thread(
                target=lambda: health.append(httpx.get(coreless.url + "/health", timeout=20))
            )
            asking.start()
            asking.join(20)
            calls.append([answer.status_code for answer in health])
            return original(*args, **kwargs)

        monkeypatch.setattr(holder, name, call)
        return calls

    return watch


@pytest.mark.parametrize("path", ASKED)
def test_others_are_served_while_it_is_built(coreless, watched, path):
    holder, name, times = BUILT[path]
    calls = watched(holder, name)
    answer = ask(coreless, path)
    assert answer.status_code == 200, answer.text
    assert calls == [[200]] * times


@pytest.mark.parametrize("path", ASKED)
def test_and_while_it_is_rendered(coreless, watched, path):
    calls = watched(answers, "body")
    answer = ask(coreless, path)
    assert answer.status_code == 200, answer.text
    assert calls == [[200]]


@pytest.mark.parametrize("path", ASKED)
def test_what_fails_while_it_is_built_is_told_and_ends_the_request(coreless, monkeypatch, path):
    def broken(*_, **__):
        raise RuntimeError("no such thing")

    holder, name, _ = BUILT[path]
    monkeypatch.setattr(holder, name, broken)
    answer = ask(coreless, path)
    assert answer.status_code == 500, answer.text
    assert answer.json()["error"]["code"] == "internal_error"
    assert len(coreless.service.grants) == 0
    monkeypatch.undo()
    assert ask(coreless, path).status_code == 200


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("logprobs", [True, False])
def test_what_clients_may_not_see_is_left_out(coreless, path, logprobs):
    body = {name: value for name, value in ASKED[path].items() if logprobs or name not in EXTRA}
    url, headers = coreless.url + path, coreless.headers()
    answer = httpx.post(url, json=body, headers=headers, timeout=60).json()
    assert not set(answers.HIDDEN) & set(answer)
    assert answer["experts"]["effective"]
    for choice in answer.get("choices", []):
        assert not set(answers.HIDDEN_IN_CHOICE) & set(choice)
    if path == "/v1/responses":
        told = httpx.post(url, json={**body, "stream": True}, headers=headers, timeout=60).text
        for name in answers.HIDDEN:
            assert f'"{name}":' not in told
        assert '"experts":' in told


def test_a_builder_that_would_wait_is_an_error():
    async def waits():
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="waits"):
        building._finished(waits())
