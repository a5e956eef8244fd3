"""The self-test of the cache's namespaces, on engines that cache as they should and otherwise."""

import asyncio
from types import SimpleNamespace

import pytest

from expertgate.model.catalogue import Catalogue
from expertgate.server import run
from expertgate.server.audit.trail import Trail
from expertgate.server.cache_salts import CacheSalts
from expertgate.server.failures import ProofError
from expertgate.server.grants import Grants
from expertgate.server.guard import GuardedLLM
from expertgate.server.proof import prove_namespaces
from expertgate.server.service import Service
from tests.server.audit.logs import RECORDED
from tests.server.fakes import FakeEngine


class Caching(FakeEngine):
    """Finds a prompt again by `key`, and is asked for tokens of blocks of 16."""

    def __init__(self, key):
        super().__init__()
        self.key = key
        self.kept = set()
        self.model_config = SimpleNamespace(max_model_len=256, get_vocab_size=lambda: 320)
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(block_size=16, enable_prefix_caching=True)
        )

    async def generate(self, prompt, params, request_id, **rest):
        key = self.key(prompt, params)
        async for output in super().generate(prompt, params, request_id, **rest):
            output.num_cached_tokens = 16 if key in self.kept else 0
            yield output
        self.kept.add(key)


def guard(engine, grants):
    return GuardedLLM(engine, grants, CacheSalts(b"w"))


def proved(key, experts=4):
    engine = Caching(key)
    grants = Grants()
    asyncio.run(prove_namespaces(guard(engine, grants), grants, experts, RECORDED))
    assert len(grants) == 0
    return engine


def tokens(prompt):
    return tuple(prompt["prompt_token_ids"])


def by_salt(prompt, params):
    return tokens(prompt), prompt["cache_salt"]


def test_a_cache_that_keeps_to_its_salts_is_served():
    assert len({prompt for prompt, _ in proved(by_salt).kept}) == 1
    proved(by_salt, experts=1)


def test_one_that_reads_no_salt_is_not():
    with pytest.raises(ProofError, match="that isn't theirs"):
        proved(lambda prompt, params: tokens(prompt))


def test_one_that_finds_nothing_again_is_not():
    with pytest.raises(ProofError, match="not found again"):
        proved(lambda prompt, params: object())


def test_a_cache_that_is_off_has_nothing_to_show():
    engine = Caching(by_salt)
    engine.vllm_config.cache_config.enable_prefix_caching = False
    grants = Grants()
    asyncio.run(prove_namespaces(guard(engine, grants), grants, 4, RECORDED))
    assert engine.calls == []


def test_an_engine_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(run, "_PROOF_S", 0.05)

    class Silent(FakeEngine):
        async def collective_rpc(self, method):
            await asyncio.Event().wait()

    catalogue = Catalogue.default(3)
    service = Service(catalogue, None, None, Trail(None, catalogue))
    with pytest.raises(ProofError, match=r"didn't prove itself within 0.05 s"):
        asyncio.run(run._open(service, guard(Silent(), service.grants), lambda _: None))
    assert service.engine is None
