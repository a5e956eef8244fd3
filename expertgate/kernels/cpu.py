"""The layer on a CPU: vLLM's own kernel, never given an empty slot, or the obvious loop.

Dimensions: T tokens, E experts, K slots, H hidden, I inner.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from expertgate.kernels import reference
from expertgate.kernels.routing import NO_EXPERT, RoutingPlan, expert_bits

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x [N, H], weights [N, S] and experts [N, S], none of them empty → [N, H]."""

# vLLM's CPU kernel sizes its scratch memory with 32-bit integers.
_MAX_PAIRS_A_CALL = 16384
# What H and I must be multiples of there.
_MULTIPLE = 32
# To read an expert's weights takes as long as the work of so many (token, expert) pairs, and a
# call, with the copies for it, as that of so many more: between what was measured with vector
# instructions and with AMX's matrices (docs/kernels-log.md).
_READ_COST = 16
_CALL_COST = 8


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
    odd = w.shape[1] % _MULTIPLE or w.shape[2] % _MULTIPLE
    if w.is_cuda or odd or not hasattr(torch.ops._C, "cpu_fused_moe"):
        return w
    # As vLLM chooses them.
    amx = platform.machine() == "x86_64" and torch.cpu._is_amx_tile_supported()
    # Linux gives AMX to a process that asks for it, and ends one that doesn't.
    amx = amx and w.dtype is torch.bfloat16 and torch.cpu._init_amx()
    instructions = "amx" if amx else "vec"
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
    """The work of the slots that name an expert, and of no other expert; [T, H] in x's dtype.

    `run` knows no empty slots. Tokens that use equally many go to it together, with as many slots;
    where that is dearer than to fill the slots that some leave empty (`_together`), with those that
    use more. What fills a slot is the token's best expert once more, at weight 0, which adds
    nothing: `run` adds up slot by slot, so a token's result has the same bits with whomever it
    goes, as long as that expert's own output is finite: where it has overflowed to infinity, alone
    the token is infinite and with a filled slot NaN.
    """
    rows, slots = plan.experts.shape
    at_once = _MAX_PAIRS_A_CALL // slots
    if rows > at_once:
        parts = zip(*(torch.split(whole, at_once) for whole in (x, *plan)), strict=True)
        return torch.cat([run_used(some, RoutingPlan(*of_some), run) for some, *of_some in parts])
    if not rows:
        return torch.empty_like(x)
    if int(plan.experts.min()) != NO_EXPERT:
        return run(x, *plan)
    used = (plan.experts != NO_EXPERT).sum(1)
    least, most = int(used.min()), int(used.max())
    calls = _together(*_tally(plan.experts, used)) if least != most else []
    if least and len(calls) < 2:
        return run(x, *_filled(plan, most))
    out = torch.zeros_like(x)
    for counts in calls:
        [here] = torch.nonzero((used >= counts.start) & (used < counts.stop), as_tuple=True)
        part = RoutingPlan(*(of_all.index_select(0, here) for of_all in plan))
        done = run(x.index_select(0, here), *_filled(part, counts.stop - 1))
        out.index_copy_(0, here, done)
    return out


def _filled(plan: RoutingPlan, slots: int) -> RoutingPlan:
    """The first `slots` of each token, which uses at least one; none is left empty."""
    experts = plan.experts[:, :slots]
    filled = torch.where(experts == NO_EXPERT, experts[:, :1], experts)
    return RoutingPlan(plan.weights[:, :slots].contiguous(), filled)


def _tally(experts: torch.Tensor, used: torch.Tensor) -> tuple[list[int], list[int]]:
    """How many tokens use 0, 1, ... K slots, and which experts those name, as bits.

    `experts` [T, K], of 64 experts at most; `used` [T].
    """
    slots = experts.shape[1]
    # Row: slots used; column: the expert, after one for the slots without.
    cells = (used[:, None] * 65 + experts + 1).flatten()
    named = torch.bincount(cells, minlength=(slots + 1) * 65).view(slots + 1, 65)[:, 1:] > 0
    bits = (named * expert_bits(64)).sum(1).tolist()
    return torch.bincount(used, minlength=slots + 1).tolist(), bits


def _together(tokens: list[int], experts: list[int]) -> list[range]:
    """Which numbers of used slots go to the kernel in one call, at the least cost; from `_tally`.

    A call does as many pairs of each of its tokens as its last number says.
    """
    present = [count for count, some in enumerate(tokens) if count and some]
    # The cheapest way for the first n numbers that are present: its cost, and its calls.
    best: list[tuple[int, list[range]]] = [(0, [])]
    for end in range(1, len(present) + 1):
        most, rows, read, ways = present[end - 1], 0, 0, []
        for start in reversed(range(end)):
            count = present[start]
            rows += tokens[count]
            read |= experts[count] % (1 << 64)
            cost = _CALL_COST + _READ_COST * read.bit_count() + most * rows
            before, calls = best[start]
            ways.append((before + cost, [*calls, range(count, most + 1)]))
        best.append(min(ways, key=lambda way: way[0]))
    return best[-1][1]


def run_packed(
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    instructions: str,
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
) -> torch.Tensor:
    """The kernel of vLLM, on weights that are `Packed`; as `Kernel` has the rest."""
    x = x.contiguous()
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
