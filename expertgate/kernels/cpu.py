"""The layer on a CPU: vLLM's own kernel, never given an empty slot, or the obvious loop.

Dimensions: T tokens, E experts, K slots, H hidden, I inner, P (token, expert) pairs.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from expertgate.kernels import reference
from expertgate.kernels.routing import NO_EXPERT, RoutingPlan

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x [N, H], weights [N, S] and experts [N, S], none of them empty → [N, H]."""

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
        packed = (w_gate_up.values, w_down.values, w_down.instructions)
        return run_used(x, plan, partial(run_packed, *packed))
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


def run_used(
    x: torch.Tensor,
    plan: RoutingPlan,
    run: Kernel,
) -> torch.Tensor:
    """The work of the slots that name an expert, and of no other; [T, H] in x's dtype.

    `run` knows no empty slots. Tokens whose K slots are all used go to it as they are; the others
    as P (token, expert) pairs, with S = 1, whose results are added up here. Which of the two a
    token is depends on that token alone, so its result does not depend on which others are in the
    batch.
    """
    rows, slots = plan.experts.shape
    at_once = _MAX_PAIRS_A_CALL // slots
    if rows > at_once:
        parts = zip(*(torch.split(whole, at_once) for whole in (x, *plan)), strict=True)
        return torch.cat([run_used(rows, RoutingPlan(*part), run) for rows, *part in parts])
    if not rows:
        return torch.empty_like(x)
    if int(plan.experts.min()) != NO_EXPERT:
        return run(x, *plan)
    full = plan.experts.amin(1) != NO_EXPERT
    out = torch.empty_like(x)
    for tokens, work in ((full, run), (~full, partial(_run_pairs, run=run))):
        [place] = torch.nonzero(tokens, as_tuple=True)
        if len(place):
            done = work(x[place], plan.weights[place], plan.experts[place])
            out.index_copy_(0, place, done)
    return out


def _run_pairs(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    run: Kernel,
) -> torch.Tensor:
    """Arguments as `run` has them, but with empty slots, and as `run` gives it: [N, H]."""
    slots = experts.shape[1]
    used = torch.nonzero(experts.flatten() != NO_EXPERT)[:, 0]
    parts = x.new_zeros(experts.numel(), x.shape[1])
    if len(used):
        pairs = run(
            x.index_select(0, used // slots),
            weights.reshape(-1, 1).index_select(0, used),
            experts.reshape(-1, 1).index_select(0, used),
        )
        parts.index_copy_(0, used, pairs)
    # Slot by slot: `index_add_` and `sum` start threads even for a few rows, and their waiting for
    # one another takes longer than the sums.
    first, *others = parts.view(len(x), slots, -1).unbind(1)
    total = first.float()
    for part in others:
        total += part
    return total.to(x.dtype)


def run_packed(
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    instructions: str,
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
) -> torch.Tensor:
    """The kernel of vLLM, on weights that are `Packed`; as `Kernel` has the rest."""
    out = torch.empty_like(x)
    torch.ops._C.cpu_fused_moe(
        out,
        x,
        w_gate_up,
        w_down,
        None,  # no biases
        None,
        weights,
        experts,
        False,  # the weights are applied here
        "silu",
        instructions,
    )
    return out
