"""Beam search makes parameters of its own, which carry no grant."""

import asyncio

import pytest
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.sampling_params import BeamSearchParams

from expertgate.server.cache_salts import CacheSalts
from expertgate.server.grants import GrantError, Grants
from expertgate.server.guard import GuardedLLM
from tests.server.fakes import FakeEngine


@pytest.mark.parametrize("value", [True, False])
def test_a_request_for_it_is_refused(server, value):
    for ask in server.asks:
        response = ask("alice", use_beam_search=value, n=2)
        assert response.status_code == 400
        assert "use_beam_search" in response.json()["error"]["message"]


def test_vllms_own_beam_search_cannot_pass_the_guard():
    engine = FakeEngine()
    guard = GuardedLLM(engine, Grants(), CacheSalts(b"w"))

    class Beams(BeamSearchOnlineMixin):
        engine_client = guard

        class renderer:  # noqa: N801
            @staticmethod
            def get_tokenizer():
                class Tokenizer:
                    eos_token_id = 0

                return Tokenizer()

    class Inputs:
        @staticmethod
        def resolve_watermarking(params):
            return False

    guard.input_processor = Inputs()
    prompt = {"type": "token", "prompt_token_ids": [1, 2]}

    async def search():
        params = BeamSearchParams(beam_width=2, max_tokens=2)
        return [output async for output in Beams().beam_search(prompt, "id", params)]

    with pytest.raises(GrantError):
        asyncio.run(search())
    assert engine.calls == []
