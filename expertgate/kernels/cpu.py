"""The layer on a CPU: vLLM's own kernel, given pairs instead of tokens, or the obvious loop.

Dimensions: T tokens, E experts, K slots, H hidden, I inner, P (token, expert) pairs.
"""

import platform
from collections.abc import Callable

import torch

from expertgate.kernels import reference
from expertgate.kernels.routing import NO_EXPERT, RoutingPlan

# vLLM's CPU kernel sizes its scratch memory with 32-bit integers.
_MAX_PAIRS_A_CALL = 16384
# What H and I must be multiples of there.
_MULTIPLE = 32


def experts(
    x: torch.Tensor,
    plan: RoutingPlan,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    deterministic: bool = False,
) -> torch.Tensor:
    """[T, H] in x's dtype; arguments as `masked_moe` has them, and `plan` of T tokens.

    vLLM's kernel is used where something has loaded it into this process (`import vllm`), and where
    the sizes are its own. It wants weights in an order of its own: those of the experts consulted
    are brought into it at each call, which costs about as much as reading them. `deterministic`
    matters to the loop alone, whose products are of as many rows as an expert has tokens.
    """
    if _has_kernel(w_down):
        return _by_vllm(x, plan, w_gate_up, w_down)
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
    tokens, slots = torch.nonzero(plan.experts != NO_EXPERT, as_tuple=True)
    out = torch.zeros(x.shape, dtype=torch.float32)
    for start in range(0, len(tokens), _MAX_PAIRS_A_CALL):
        token = tokens[start : start + _MAX_PAIRS_A_CALL]
        slot = slots[start : start + _MAX_PAIRS_A_CALL]
        pairs = run(x[token], plan.weights[token, slot, None], plan.experts[token, slot, None])
        out.index_add_(0, token, pairs.float())
    return out.to(x.dtype)


def _has_kernel(w_down: torch.Tensor) -> bool:
    _, H, I = w_down.shape
    return not (H % _MULTIPLE or I % _MULTIPLE) and hasattr(torch.ops._C, "cpu_fused_moe")


def _by_vllm(
    x: torch.Tensor, plan: RoutingPlan, w_gate_up: torch.Tensor, w_down: torch.Tensor
) -> torch.Tensor:
    isa = _instructions(x.dtype)
    consulted = sorted(set(plan.experts.flatten().tolist()) - {NO_EXPERT})
    local = torch.full((len(w_down),), NO_EXPERT, dtype=torch.int32)
    local[consulted] = torch.arange(len(consulted), dtype=torch.int32)
    packed_gate_up = _pack(w_gate_up, consulted, isa)
    packed_down = _pack(w_down, consulted, isa)

    def run(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops._C.cpu_fused_moe(
            out,
            x,
            packed_gate_up,
            packed_down,
            None,  # no biases
            None,
            weights,
            local[experts.long()],
            False,  # the weights are applied
            "silu",
            isa,
        )
        return out

    return run_pairs(x, plan, run)


def _pack(w: torch.Tensor, consulted: list[int], isa: str) -> torch.Tensor:
    """The consulted experts' matrices in the order that vLLM's kernel reads them."""
    packed = w.new_empty((len(consulted), *w.shape[1:]))
    for place, expert in enumerate(consulted):
        torch.ops._C.prepack_moe_weight(w[expert : expert + 1], packed[place : place + 1], isa)
    return packed


def _instructions(dtype: torch.dtype) -> str:
    """The name of the kernel's variant, as vLLM itself chooses it."""
    amx = platform.machine() == "x86_64" and torch.cpu._is_amx_tile_supported()
    return "amx" if amx and dtype is torch.bfloat16 else "vec"
