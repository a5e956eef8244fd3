"""Blocks that another expert set or another tenant computed must not be found again."""

import uuid

import pytest

from tests.server.running import BLOCK_TOKENS


def cached(response):
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture
def prompt():
    # The checkpoint's tokenizer gives one token a byte; fresh, so no other test has cached it.
    return uuid.uuid4().hex * 20


def test_the_same_set_and_tenant_share(server, prompt):
    assert cached(server.complete("alice", prompt=prompt)) == 0
    assert cached(server.complete("alice", prompt=prompt)) >= BLOCK_TOKENS


def test_another_tenant_of_the_same_set_does_not(server, prompt):
    assert cached(server.complete("alice", prompt=prompt, experts=["public"])) == 0
    assert cached(server.complete("bob", prompt=prompt, experts=["public"])) == 0
    assert cached(server.complete("bob", prompt=prompt)) >= BLOCK_TOKENS


def test_another_set_of_the_same_tenant_does_not(server, prompt):
    fresh = server.complete("alice", prompt=prompt, experts=["public"], logprobs=1)
    assert cached(server.complete("alice", prompt=prompt)) == 0
    assert cached(server.complete("alice", prompt=prompt, experts=["public", "math"])) == 0
    # As many, but not the same.
    assert cached(server.complete("alice", prompt=prompt, experts=["public", "news"])) == 0
    again = server.complete(
        "alice", prompt=prompt, experts=["public"], logprobs=1, cache_salt="elsewhere"
    )
    assert fresh.json()["choices"][0]["logprobs"] == again.json()["choices"][0]["logprobs"]


def test_a_callers_own_salt_narrows_and_never_widens(server, prompt):
    assert cached(server.complete("alice", prompt=prompt, cache_salt="ours")) == 0
    assert cached(server.complete("alice", prompt=prompt, cache_salt="ours")) >= BLOCK_TOKENS
    assert cached(server.complete("alice", prompt=prompt)) == 0
    # The same salt from someone else, and for another set.
    assert cached(server.complete("dave", prompt=prompt, cache_salt="ours")) == 0
    experts = ["public"]
    assert cached(server.complete("alice", prompt=prompt, cache_salt="ours", experts=experts)) == 0


@pytest.mark.parametrize("retention", ["in_memory", "24h"])
def test_openais_hints_for_its_cache_neither_narrow_nor_widen_this_one(server, prompt, retention):
    messages = [{"role": "user", "content": prompt}]
    for ask, fields in (
        (server.chat, {"messages": messages}),
        (server.complete, {"prompt": prompt}),
        (server.respond, {"input": messages}),
    ):
        fields |= {"experts": ["public"], "cache_salt": uuid.uuid4().hex}

        def found(user, key, ask=ask, fields=fields):
            hints = {} if key is None else {"prompt_cache_key": key, "safety_identifier": key}
            response = ask(user, prompt_cache_retention=retention, **fields, **hints)
            assert response.status_code == 200, response.text
            return response.json()["experts"]["cached"]

        assert found("alice", "ours") == 0
        shared = found("alice", "ours")
        assert shared >= BLOCK_TOKENS
        assert [found("alice", key) for key in ("another", "", None)] == [shared] * 3
        assert found("dave", "ours") == 0
