"""The layer on a CPU: vLLM's own kernel, given pairs instead of tokens, or the obvious loop.

Dimensions: T tokens, E experts, K slots, H hidden, I inner, P (token, expert) pairs.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from expertgate.kernels import reference
from expertgate.kernels.routing import NO_EXPERT, RoutingPlan

# vLLM's CPU kernel sizes its scratch memory with 32-bit integers.
_MAX_PAIRS_A_CALL = 16384
# What H and I must be multiples of there.
_MULTIPLE = 32


@dataclass(frozen=True)
class Packed:
    """Weights of all experts in the order that vLLM's CPU kernel reads; see `pack`."""

    values: torch.Tensor
    """[E, rows, columns], as before; a copy, in which later changes of the weights don't show."""
    instructions: str
    """Of which processor: the name that vLLM gives the kernel's variant."""


def pack(w: torch.Tensor) -> torch.Tensor | Packed:
    """`w` [E, rows, columns] as `masked_moe` runs fastest; to be called once, when it is loaded.

    A copy in an order of its own where vLLM's CPU kernel is loaded in this process (`import vllm`)
    and takes such sizes (multiples of 32); anywhere else, `w` itself.
    """
    sizes = w.shape[1] % _MULTIPLE or w.shape[2] % _MULTIPLE
    if w.is_cuda or sizes or not hasattr(torch.ops._C, "cpu_fused_moe"):
        return w
    # As vLLM chooses them.
    amx = platform.machine() == "x86_64" and torch.cpu._is_amx_tile_supported()
    instructions = "amx" if amx and w.dtype is torch.bfloat16 else "vec"
    values = torch.empty_like(w)
    torch.ops._C.prepack_moe_weight(w, values, instructions)
    return Packed(values, instructions)


def experts(
    x: torch.Tensor,
    plan: RoutingPlan,
    w_gate_up: torch.Tensor | Packed,
    w_down: torch.Tensor | Packed,
    *,
    deterministic: bool = False,
) -> torch.Tensor:
    """[T, H] in x's dtype; arguments as `masked_moe` has them, and `plan` of T tokens.

    `deterministic` matters to the loop alone, whose products are of as many rows as an expert has
    tokens.
    """
    if isinstance(w_gate_up, Packed) and isinstance(w_down, Packed):
        return run_pairs(x, plan, _kernel(w_gate_up, w_down))
    assert isinstance(w_gate_up, torch.Tensor)
    assert isinstance(w_down, torch.Tensor)
    if not deterministic:
        return reference.experts(x, plan, w_gate_up, w_down)
    out = torch.zeros_like(x)
    for token in range(len(x)):
        here = slice(token, token + 1)
        alone = RoutingPlan(plan.weights[here], plan.experts[here])
        out[here] = reference.experts(x[here], alone, w_gate_up, w_down)
    return out


def run_pairs(
    x: torch.Tensor,
    plan: RoutingPlan,
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The work of the P pairs that name an expert, and no other; [T, H] in x's dtype.

    Each goes to `run` as a token with one slot: rows of x [P, H], weights [P, 1] and experts
    [P, 1], giving [P, H]. They are summed in float32 in the order of their slots, so that a token's
    result does not depend on which others are in the batch.
    """
    out = torch.empty_like(x)
    at_once = _MAX_PAIRS_A_CALL // plan.experts.shape[1]
    for start in range(0, len(x), at_once):
        here = slice(start, start + at_once)
        parts = _pairs(x[here], plan.weights[here], plan.experts[here], run).unbind(1)
        # Slot by slot: `index_add_` and `sum` start threads even for a few rows, and their waiting
        # for one another takes longer than the sums.
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        out[here] = total
    return out


def _pairs(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """[T, K, H], weighted; zeros where a slot is empty."""
    shape = (*experts.shape, x.shape[1])
    # Empty slots are a token's last, so the last column tells whether there is any.
    if bool((experts[:, -1] != NO_EXPERT).all()):
        rows = x.repeat_interleave(shape[1], 0)
        return run(rows, weights.reshape(-1, 1), experts.reshape(-1, 1)).view(shape)
    used = torch.nonzero(experts.flatten() != NO_EXPERT)[:, 0]
    parts = x.new_zeros(experts.numel(), shape[2])
    if len(used):
        pairs = run(
            x.index_select(0, used // shape[1]),
            weights.reshape(-1, 1).index_select(0, used),
            experts.reshape(-1, 1).index_select(0, used),
        )
        parts.index_copy_(0, used, pairs)
    return parts.view(shape)


def _kernel(
    w_gate_up: Packed, w_down: Packed
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops._C.cpu_fused_moe(
            out,
            x,
            w_gate_up.values,
            w_down.values,
            None,  # no biases
            None,
            weights,
            experts,
            False,  # the weights are applied here
            "silu",
            w_down.instructions,
        )
        return out

    return run
