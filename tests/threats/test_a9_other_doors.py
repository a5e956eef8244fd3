"""vLLM's engine has many more methods than serving needs; each is a way around the grant."""

import inspect

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM

from expertgate.policies.expert_set import PUBLIC_ONLY
from expertgate.server.cache_salts import CacheSalts
from expertgate.server.grants import HANDLE_ARG, GrantError, Grants
from expertgate.server.guard import GuardedLLM
from tests.server.audit.logs import RECORDED
from tests.server.fakes import FakeEngine

# Of vLLM's own methods, those that handlers may reach. `generate` asks for a grant; the others
# neither run nor change anything.
LISTED = {"generate", "check_admission", "dead_error", "errored", "is_tracing_enabled", "shutdown"}


def vllms_methods():
    return {name for name, _ in inspect.getmembers(AsyncLLM) if not name.startswith("_")}


def test_vllms_other_methods_do_not_exist():
    doors = vllms_methods() - LISTED
    assert {"encode", "add_request", "collective_rpc", "abort", "sleep"} <= doors
    guard = GuardedLLM(FakeEngine(), Grants(), CacheSalts(b"w"))
    for door in sorted(doors):
        assert not hasattr(guard, door), door
    assert not isinstance(guard, AsyncLLM)


async def stream_of_prompts():
    yield {"type": "token", "prompt_token_ids": [1]}


@pytest.mark.parametrize(
    "prompt",
    [
        "text",
        {"prompt": "text"},
        stream_of_prompts(),
        EngineCoreRequest(
            request_id="mine",
            prompt_token_ids=[1],
            mm_features=None,
            sampling_params=SamplingParams(extra_args={"expertgate_mask": 127}),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        ),
    ],
    ids=["raw text", "raw prompt", "stream of prompts", "engine request"],
)
def test_only_rendered_prompts_run_even_with_a_grant(prompt):
    engine, grants = FakeEngine(), Grants()
    guard = GuardedLLM(engine, grants, CacheSalts(b"w"))
    with grants.issue(PUBLIC_ONLY, "bob", recorded=RECORDED) as grant:
        params = SamplingParams(extra_args={HANDLE_ARG: grant.handle})
        with pytest.raises(GrantError):
            guard.generate(prompt, params, "id")
    assert engine.calls == []
