"""What vLLM's handlers leave in the log."""

import logging
import sys

import pytest

from expertgate.server import handlers  # noqa: F401  # puts its filter on vLLM's logs
from expertgate.server.grants import WithdrawnError


@pytest.mark.parametrize("module", ["chat_completion", "completion"])
def test_vllm_logs_what_is_the_servers_fault_alone(module):
    logger = logging.getLogger(f"vllm.entrypoints.openai.{module}.serving")
    for error, logged in ((WithdrawnError("no longer"), False), (RuntimeError("ours"), True)):
        try:
            raise error
        except RuntimeError:
            record = logger.makeRecord("", logging.ERROR, "", 0, "", (), sys.exc_info())
        assert bool(logger.filter(record)) is logged
