"""Whose kernels do the experts' work on a GPU: an option of ours that vLLM's config carries."""

from collections.abc import Mapping
from typing import Any

OPTION = "expertgate_moe_kernel"
"""The key in vLLM's `additional_config`."""

KERNELS = ("expertgate", "vllm")
"""Ours, or vLLM's in Triton. Either skips the slots in which a token may consult nobody."""

DEFAULT = "vllm"
"""vLLM's, until ours have been measured beside them on a GPU."""


def wanted(additional_config: Mapping[str, Any]) -> str:
    """One of KERNELS. Raises ValueError."""
    kernel: str = additional_config.get(OPTION, DEFAULT)
    if kernel not in KERNELS:
        raise ValueError(f"{OPTION} is {kernel!r}; it may be {' or '.join(KERNELS)}")
    return kernel
