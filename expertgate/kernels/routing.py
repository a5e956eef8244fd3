"""Masked routing: which experts a token consults, and with what weight.

Dimensions: T tokens, E experts, K = min(top_k, E) slots.
"""

from typing import NamedTuple

import torch

NO_EXPERT = -1
_TINY = torch.finfo(torch.float32).tiny


class RoutingPlan(NamedTuple):
    """`weights` [T, K] float32 and `experts` [T, K] int32, the best expert first.

    A token with fewer than K allowed experts has NO_EXPERT, with weight 0, in its last slots: they
    stand for no work, and no weight of any expert may be read for them.
    """

    weights: torch.Tensor
    experts: torch.Tensor


def mask_logits(
    router_logits: torch.Tensor, allowed: torch.Tensor, router_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [T, E] as float32 with -inf for every expert that a token may not consult.

    `allowed` [T] int64: bit e set means that expert e may be consulted. `router_bias` [E-1] for
    experts 1..: min(bias, 0) is added, as FlexOlmo's negative bias is (arXiv 2507.07024, §3.3.2).
    Excluded logits are replaced, not added to, so that a NaN among them goes nowhere.
    """
    if router_bias is not None:
        router_bias = router_bias.float().clamp(max=0)
    bits = expert_bits(router_logits.shape[1], router_logits.device)
    return exclude(router_logits, allowed, bits, router_bias)


def exclude(
    router_logits: torch.Tensor,
    allowed: torch.Tensor,
    bits: torch.Tensor,
    negative_bias: torch.Tensor | None,
) -> torch.Tensor:
    """`mask_logits` for those who keep what is always the same: `bits` [E], from `expert_bits`.

    `negative_bias` [E-1] float32 for experts 1.. is added as it is.
    """
    logits = router_logits.to(torch.float32, copy=True)
    if negative_bias is not None:
        logits[:, 1:] += negative_bias
    return logits.masked_fill_((allowed[:, None] & bits) == 0, -torch.inf)


def expert_bits(num_experts: int, device: torch.device | None = None) -> torch.Tensor:
    """[E] int64: bit e for expert e."""
    experts = torch.arange(num_experts, device=device)
    return torch.ones_like(experts) << experts


def select(
    masked_logits: torch.Tensor, *, top_k: int, renormalize: bool = False, empty: int = NO_EXPERT
) -> RoutingPlan:
    """The K = min(top_k, E) best experts of each token among those whose logit is not -inf.

    `masked_logits` [T, E] float32, from `mask_logits`. The softmax runs over the allowed experts
    only, as it would if the other rows did not exist; equal weights go to the lower index. `empty`:
    what a slot names that has no expert.
    """
    # By the logits, not by the weights: weights that underflow to 0 keep their order.
    order = torch.topk(rank_keys(masked_logits), min(top_k, masked_logits.shape[1]), dim=-1)[1]
    left = masked_logits.gather(1, order) == -torch.inf
    weights = torch.softmax(masked_logits, dim=-1).gather(1, order)
    # A token with an empty mask has only -inf, whose softmax is NaN: filled here as well.
    weights = weights.masked_fill(left, 0.0)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(_TINY)
    return RoutingPlan(weights, order.to(torch.int32).masked_fill(left, empty))


def rank_keys(logits: torch.Tensor) -> torch.Tensor:
    """[T, E] int64, no two of a row equal: greater for a greater logit, then for a lower index.

    A stable sort of the logits gives the same order, but took 2 to 3 times as long as `topk`, which
    leaves open in which order equal ones come.
    """
    # A NaN comes first, whatever its sign and its other bits.
    bits = logits.nan_to_num(torch.nan, torch.inf, -torch.inf).view(torch.int32)
    # As integers the bits of negative numbers have the wrong order; -0.0 becomes 0, as 0.0 is.
    ordered = torch.where(bits < 0, -(1 << 31) - bits, bits).to(torch.int64)
    experts = logits.shape[1]
    return ordered * experts + torch.arange(experts - 1, -1, -1, device=logits.device)


def route(
    router_logits: torch.Tensor,
    allowed: torch.Tensor | None,
    *,
    top_k: int,
    router_bias: torch.Tensor | None = None,
    renormalize: bool = False,
    empty: int = NO_EXPERT,
) -> RoutingPlan:
    """`mask_logits`, where there are masks, then `select`; the shapes are theirs."""
    if allowed is not None:
        router_logits = mask_logits(router_logits, allowed, router_bias)
    return select(router_logits.float(), top_k=top_k, renormalize=renormalize, empty=empty)
