"""The `vllm.general_plugins` entry point; vLLM calls it in every process it starts."""

import multiprocessing
import os
import signal
import threading

from expertgate.model.checkpoint import ARCHITECTURE


def register() -> None:
    """Replaces vLLM's generic stand-in for FlexOlmo by the native model."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    # By name, so that importing the model waits until a worker needs it.
    ModelRegistry.register_model(ARCHITECTURE, f"expertgate.model.flex_olmo:{ARCHITECTURE}")
    _empty_blocks()
    _end_with_the_parent()
    if current_platform.is_cpu():
        _wait_without_yielding()


def _empty_blocks() -> None:
    """A block of the KV cache holds zeros when a request gets it, whoever had it before.

    Attention reads a block by groups of tokens, and multiplies what is behind the last one by zero.
    That leaves nothing of a number, but NaN of NaN or infinity: one answer that overflowed in an
    expert would spoil those of others who may not consult it. vLLM has this for caches of several
    precisions, whose blocks hold such values as a matter of course.
    """
    from vllm.v1.kv_cache_interface import KVCacheConfig

    KVCacheConfig.needs_kv_cache_zeroing = property(lambda _: True)


def _wait_without_yielding() -> None:
    """On CPUs, engine and worker wait for each other by sleeping for no time, not by yielding.

    Under Linux 6.18, where two cores were all there were, a loop of `sched_yield` kept other
    processes waiting for seconds, the one that serves the streams among them; that was seen, and
    that it ends with this. It ended neither with one sleep in 64 turns.
    """
    from vllm.distributed import utils

    utils.USE_SCHED_YIELD = False


def _end_with_the_parent() -> None:
    """A process of vLLM's ends when the one that started it does, however that came about.

    vLLM's workers end with their engine; but were the server killed, as where memory runs out, its
    engine would stay with all that it holds, and the next one not find enough.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="parent", daemon=True).start()
