"""What a call of the layer must fulfil; looked at before any kernel could read out of bounds.

Only shapes, dtypes and devices: looking at a value would make a GPU wait.
"""

import torch

from expertgate.kernels.cpu import Packed

MAX_EXPERTS = 64
MAX_TOP_K = 16
MULTIPLE = 16
"""What H and I must be multiples of."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class InputError(ValueError):
    """An argument of the masked layer that it can't take; says which, what, and what would do."""


def check_routing(
    router_logits: torch.Tensor,
    allowed: torch.Tensor | None,
    top_k: int,
    router_bias: torch.Tensor | None,
) -> None:
    """Raises InputError."""
    _must(router_logits.dim() == 2, "router_logits", router_logits, "[T, E]")
    _must(router_logits.dtype.is_floating_point, "router_logits", router_logits, "floating point")
    T, E = router_logits.shape
    if not 1 <= E <= MAX_EXPERTS:
        raise InputError(f"router_logits has {E} experts; it may have 1 to {MAX_EXPERTS}")
    if not 1 <= top_k <= MAX_TOP_K:
        raise InputError(f"top_k is {top_k}; it may be 1 to {MAX_TOP_K}")
    if allowed is not None:
        _must(allowed.shape == (T,), "allowed", allowed, f"[T = {T}]")
        _must(allowed.dtype is torch.int64, "allowed", allowed, "int64, a bit for each expert")
        _beside("allowed", allowed, router_logits)
    if router_bias is not None:
        if allowed is None:
            raise InputError("router_bias is given without allowed; masked logits have it already")
        _must(router_bias.shape == (E - 1,), "router_bias", router_bias, f"[E-1 = {E - 1}]")
        _must(router_bias.dtype.is_floating_point, "router_bias", router_bias, "floating point")
        _beside("router_bias", router_bias, router_logits)


def check_copy(copy: torch.Tensor, router_logits: torch.Tensor) -> None:
    """Raises InputError. `router_logits` must have been checked."""
    good = copy.shape == router_logits.shape and copy.dtype is torch.float32
    _must(good, "copy", copy, f"{list(router_logits.shape)} float32, as the logits are")
    _must(copy.is_contiguous(), "copy", copy, "contiguous")
    _beside("copy", copy, router_logits)


def check_experts(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: torch.Tensor | Packed,
    w_down: torch.Tensor | Packed,
) -> None:
    """Raises InputError. `router_logits` must have been checked."""
    if isinstance(w_gate_up, Packed) != isinstance(w_down, Packed):
        raise InputError("one of w_gate_up and w_down is packed, the other isn't; pack both")
    w_gate_up = w_gate_up.values if isinstance(w_gate_up, Packed) else w_gate_up
    w_down = w_down.values if isinstance(w_down, Packed) else w_down
    T, E = router_logits.shape
    _must(x.dim() == 2 and len(x) == T, "x", x, f"[T = {T}, H]")
    _must(x.dtype in DTYPES, "x", x, "bfloat16, float16 or float32")
    H = x.shape[1]
    _must(w_down.dim() == 3, "w_down", w_down, f"[E = {E}, H = {H}, I]")
    I = w_down.shape[2]
    _must(w_down.shape == (E, H, I), "w_down", w_down, f"[E = {E}, H = {H}, I]")
    _must(w_gate_up.shape == (E, 2 * I, H), "w_gate_up", w_gate_up, f"{[E, 2 * I, H]} = [E, 2I, H]")
    for name, size in (("H", H), ("I", I)):
        if size % MULTIPLE or not size:
            raise InputError(f"{name} is {size}; it must be a multiple of {MULTIPLE}")
    for name, tensor in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        _must(tensor.dtype is x.dtype, name, tensor, f"{x.dtype}, as x is")
        _must(
            tensor.is_contiguous(), name, tensor, "contiguous: a copy would cost more than the work"
        )
        _beside(name, tensor, x)
    _beside("x", x, router_logits)


def _must(good: bool, name: str, tensor: torch.Tensor, wanted: str) -> None:
    if not good:
        raise InputError(
            f"{name} is {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}; "
            f"it must be {wanted}"
        )


def _beside(name: str, tensor: torch.Tensor, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise InputError(f"{name} is on {tensor.device}; the rest is on {other.device}")
