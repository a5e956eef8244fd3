"""The `vllm.general_plugins` entry point; vLLM calls it in every process it starts."""

import ctypes
import sys

ARCHITECTURE = "FlexOlmoForCausalLM"

_PR_SET_TIMERSLACK = 29
_SLACK_NS = 1000


def register() -> None:
    """Replaces vLLM's generic stand-in for FlexOlmo by the native model."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    # By name, so that importing the model waits until a worker needs it.
    ModelRegistry.register_model(ARCHITECTURE, f"expertgate.model.flex_olmo:{ARCHITECTURE}")
    if current_platform.is_cpu():
        _wait_without_yielding()


def _wait_without_yielding() -> None:
    """On CPUs, engine and worker wait for each other by sleeping for no time, not by yielding.

    Under Linux 6.18, where two cores were all there were, a loop of `sched_yield` kept other
    processes waiting for seconds, the one that serves the streams among them; that was seen, and
    that it ends with this. It ended neither with one sleep in 64 turns.
    """
    from vllm.distributed import utils

    utils.USE_SCHED_YIELD = False
    # Linux lets a sleep take 50 µs longer than asked, twice in each step of a few ms. Where this is
    # refused they stay that long.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0)
