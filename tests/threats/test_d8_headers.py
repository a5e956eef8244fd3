"""Headers and fields by which vLLM lets a client choose its priority, its rank or its session."""

import asyncio

import pytest
from vllm.sampling_params import SamplingParams

from expertgate.policies.expert_set import PUBLIC_ONLY
from expertgate.server.cache_salts import CacheSalts
from expertgate.server.grants import HANDLE_ARG, Grants
from expertgate.server.guard import GuardedLLM
from tests.server.audit.logs import RECORDED
from tests.server.fakes import FakeEngine

STEERING = {
    "priority": -100,
    "data_parallel_rank": 7,
    "session_id": "theirs",
    "trace_headers": {"traceparent": "00-1-2-01"},
}


def test_the_engine_sees_ours():
    engine, grants = FakeEngine(), Grants()
    guard = GuardedLLM(engine, grants, CacheSalts(b"w"))

    async def go():
        with grants.issue(PUBLIC_ONLY, "bob", recorded=RECORDED) as grant:
            params = SamplingParams(extra_args={HANDLE_ARG: grant.handle, "session_id": "theirs"})
            prompt = {"type": "token", "prompt_token_ids": [1]}
            return [output async for output in guard.generate(prompt, params, "id", **STEERING)]

    asyncio.run(go())
    (call,) = engine.calls
    assert not set(STEERING) & set(call.rest)
    assert "session_id" not in call.params.extra_args


@pytest.mark.parametrize("name", ["priority", "session_id", "data_parallel_rank"])
def test_the_fields_are_refused(server, name):
    for ask in server.asks:
        response = ask("alice", **{name: STEERING[name]})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name


def test_the_headers_are_not_read(server):
    headers = {
        "X-Vllm-Priority": "-100",
        "X-data-parallel-rank": "7",
        "X-Session-ID": "theirs",
    }
    for ask in server.asks:
        assert ask("alice", headers=headers).status_code == 200
