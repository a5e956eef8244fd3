"""The `vllm.general_plugins` entry point; vLLM calls it in every process it starts."""

ARCHITECTURE = "FlexOlmoForCausalLM"


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
