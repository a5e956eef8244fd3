"""What the entry point changes in every process of vLLM."""

import os

import pytest
from vllm.distributed import utils
from vllm.distributed.device_communicators import shm_broadcast

from expertgate.model.plugin import register


def test_on_cpus_nothing_waits_by_yielding(monkeypatch):
    monkeypatch.setattr(utils, "USE_SCHED_YIELD", True)
    register()
    monkeypatch.setattr(os, "sched_yield", lambda: pytest.fail("yielded"))
    shm_broadcast.sched_yield()
