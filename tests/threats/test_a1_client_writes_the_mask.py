"""A client's `vllm_xargs` is the engine's `extra_args`, where masks and handles travel."""

import asyncio

import pytest
from vllm.sampling_params import SamplingParams

from expertgate.model.ledger import ACCOUNT_ARG
from expertgate.model.masks import EXTRA_ARG
from expertgate.policies.expert_set import PUBLIC_ONLY
from expertgate.server.cache_salts import CacheSalts
from expertgate.server.grants import HANDLE_ARG, Grants
from expertgate.server.guard import GuardedLLM
from tests.server.audit.logs import RECORDED
from tests.server.fakes import FakeEngine

ALL = (1 << 64) - 1
SPELLINGS = [
    {"vllm_xargs": {EXTRA_ARG: 15}},
    {"vllm_xargs": {HANDLE_ARG: "00" * 16}},
    {"vllm_xargs": {"experts": [0, 1, 2]}},
    {"vllm_xargs": {}},
    {"extra_args": {EXTRA_ARG: 15}},
    {"extra_body": {"vllm_xargs": {EXTRA_ARG: 15}}},
    {"sampling_params": {"extra_args": {EXTRA_ARG: 15}}},
    {EXTRA_ARG: 15},
    {HANDLE_ARG: "00" * 16},
    {"kv_transfer_params": {EXTRA_ARG: 15}},
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_no_spelling_gets_in(server, spelling):
    for ask in server.asks:
        for stream in (False, True):
            response = ask("bob", stream=stream, **spelling)
            assert response.status_code == 400
            error = response.json()["error"]
            assert error["code"] == "invalid_request"
            assert error["param"] in spelling


def test_the_guard_never_merges():
    engine, grants = FakeEngine(), Grants()
    guard = GuardedLLM(engine, grants, CacheSalts(b"w"))
    with grants.issue(PUBLIC_ONLY, "bob", recorded=RECORDED) as grant:
        extra_args = {HANDLE_ARG: grant.handle, EXTRA_ARG: ALL, "session_id": "x"}
        generator = guard.generate(
            {"type": "token", "prompt_token_ids": [1]}, SamplingParams(extra_args=extra_args), ""
        )
        asyncio.run(_drain(generator))
    (call,) = engine.calls
    assert call.params.extra_args == {EXTRA_ARG: PUBLIC_ONLY.mask, ACCOUNT_ARG: call.request_id}


async def _drain(generator):
    async for _ in generator:
        pass
