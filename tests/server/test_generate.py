"""Requests that are called off: what they leave in the log."""

import asyncio
import gc
import logging
import sys
from types import SimpleNamespace

import pytest

from expertgate.server import handlers  # noqa: F401  # puts its filter on vLLM's logs
from expertgate.server.grants import WithdrawnError
from expertgate.server.routes.generate import _unless_gone


def test_what_fails_as_its_request_is_called_off_is_not_logged(caplog):
    async def run():
        withdrawn = asyncio.Event()

        async def work():
            await withdrawn.wait()
            raise WithdrawnError("no longer")

        request = SimpleNamespace(receive=asyncio.Event().wait)
        asking = asyncio.create_task(_unless_gone(work(), request))
        for _ in range(3):
            await asyncio.sleep(0)
        withdrawn.set()
        asking.cancel()  # by the time that the grant had
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(run())
    gc.collect()
    assert caplog.records == []


@pytest.mark.parametrize("module", ["chat_completion", "completion"])
def test_vllm_logs_what_is_the_servers_fault_alone(module):
    logger = logging.getLogger(f"vllm.entrypoints.openai.{module}.serving")
    for error, logged in ((WithdrawnError("no longer"), False), (RuntimeError("ours"), True)):
        try:
            raise error
        except RuntimeError:
            record = logger.makeRecord("", logging.ERROR, "", 0, "", (), sys.exc_info())
        assert bool(logger.filter(record)) is logged
