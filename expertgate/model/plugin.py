"""The `vllm.general_plugins` entry point; vLLM calls it in every process it starts."""

ARCHITECTURE = "FlexOlmoForCausalLM"


def register() -> None:
    """Replaces vLLM's generic stand-in for FlexOlmo by the native model."""
    from vllm import ModelRegistry

    # By name, so that importing the model waits until a worker needs it.
    ModelRegistry.register_model(ARCHITECTURE, f"expertgate.model.flex_olmo:{ARCHITECTURE}")
