"""Masked routing: which experts a token consults, and with what weight.

Dimensions: T tokens, E experts, K = min(top_k, E) slots.
"""

import functools
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
    return exclude(router_logits, excluded_by(allowed, router_logits.shape[1]), router_bias)


def excluded_by(allowed: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[T, E] bool: True where a token may not consult the expert; `allowed` as in `mask_logits`."""
    return (allowed[:, None] & _bits(num_experts, allowed.device)) == 0


def exclude(
    router_logits: torch.Tensor, excluded: torch.Tensor, negative_bias: torch.Tensor | None
) -> torch.Tensor:
    """`mask_logits` of what several layers share: `excluded` [T, E], from `excluded_by`.

    `negative_bias` [E-1] float32 for experts 1.. is added as it is.
    """
    logits = router_logits.to(torch.float32, copy=True)
    if negative_bias is not None:
        logits[:, 1:] += negative_bias
    return logits.masked_fill_(excluded, -torch.inf)


@functools.cache
def _bits(num_experts: int, device: torch.device) -> torch.Tensor:
    """[E] int64: bit e of a mask. Kept, because a small layer's time is that of its many calls."""
    return torch.ones(num_experts, dtype=torch.int64, device=device) << torch.arange(
        num_experts, device=device
    )


def select(masked_logits: torch.Tensor, *, top_k: int, renormalize: bool = False) -> RoutingPlan:
    """The K = min(top_k, E) best experts of each token among those whose logit is not -inf.

    `masked_logits` [T, E] float32, from `mask_logits`. The softmax runs over the allowed experts
    only, as it would if the other rows did not exist; equal weights go to the lower index.
    """
    # Sorted by the logits, not by the weights: weights that underflow to 0 keep their order.
    ordered, order = torch.sort(masked_logits, dim=-1, descending=True, stable=True)
    order = order[:, :top_k]
    empty = ordered[:, :top_k] == -torch.inf
    weights = torch.softmax(masked_logits, dim=-1).gather(1, order)
    # A token with an empty mask has only -inf, whose softmax is NaN: filled here as well.
    weights = weights.masked_fill(empty, 0.0)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(_TINY)
    return RoutingPlan(weights, order.to(torch.int32).masked_fill(empty, NO_EXPERT))


def route(
    router_logits: torch.Tensor,
    allowed: torch.Tensor | None,
    *,
    top_k: int,
    router_bias: torch.Tensor | None = None,
    renormalize: bool = False,
) -> RoutingPlan:
    """`mask_logits`, where there are masks, then `select`; the shapes are theirs."""
    if allowed is not None:
        router_logits = mask_logits(router_logits, allowed, router_bias)
    return select(router_logits.float(), top_k=top_k, renormalize=renormalize)
