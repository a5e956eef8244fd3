"""Attention on CPUs over a context that vLLM would cut among threads."""

import random

import pytest
from vllm.platforms import current_platform

from expertgate.policies.expert_set import ExpertSet
from tests.support.checkpoints import random_checkpoint
from tests.support.engine import Ask, engine

ALL = ExpertSet.first(7)

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's kernels for CPUs")


def test_a_long_context_is_read_the_same_whoever_else_is_in_the_batch(tmp_path, monkeypatch):
    """In float32, where nothing rounds away what another order of additions changes."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # however few cores there are
    long, short = (random.Random(length).choices(range(256), k=length) for length in (300, 40))
    asks = [Ask(long, ALL, salt="long"), Ask(short, ALL, salt="short")]
    with engine(random_checkpoint(tmp_path)) as served:
        [beside], _ = served.ask(asks)
        served.forget()
        assert served.ask_one(asks[0]) == beside
