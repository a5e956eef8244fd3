"""The public operations: checked, then run by the kernels of the device that the tensors are on.

Dimensions: T tokens, E experts (1 to 64), K = min(top_k, E) slots (top_k 1 to 16), H hidden and I
inner (multiples of 16).
"""

import torch

from expertgate.kernels import cpu, routing
from expertgate.kernels.checks import check_copy, check_experts, check_routing
from expertgate.kernels.cpu import Packed
from expertgate.kernels.routing import NO_EXPERT, RoutingPlan


def masked_moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: torch.Tensor | Packed,
    w_down: torch.Tensor | Packed,
    allowed: torch.Tensor,
    *,
    top_k: int,
    router_bias: torch.Tensor | None = None,
    renormalize: bool = False,
    deterministic: bool = False,
) -> torch.Tensor:
    """Sums each token's allowed experts' FFNs, by their routing weights; [T, H] in x's dtype.

    `x` [T, H] bfloat16, float16 or float32; `router_logits` [T, E]; `w_gate_up` [E, 2I, H], gate
    before up, and `w_down` [E, H, I], in x's dtype and contiguous, or both through `pack`, which a
    CPU runs faster; `allowed` [T] int64, bit e set = expert e may be consulted; `router_bias` [E-1]
    for experts 1.., of which min(bias, 0) is added.

    A token gets the FFNs of the min(top_k, allowed) experts that `route` names, and zeros where it
    is allowed none. An expert that no token consults is not read at all. For inference: no
    gradients.

    A token's result depends, bit for bit, on that token alone as long as the kernels keep their
    shape, which is chosen by T. `deterministic` keeps one shape for every T, at some cost: the same
    token then has the same result in a batch of any size.

    Raises InputError for a shape, dtype or device that doesn't fit.
    """
    check_routing(router_logits, allowed, top_k, router_bias)
    check_experts(x, router_logits, w_gate_up, w_down)
    plan = _route(router_logits, allowed, top_k, router_bias, renormalize)
    if isinstance(w_gate_up, Packed) or isinstance(w_down, Packed) or not x.is_cuda:
        return cpu.experts(x, plan, w_gate_up, w_down, deterministic=deterministic)
    from expertgate.kernels.gpu import layer  # Triton takes a second, and is not needed elsewhere

    return layer.experts(x, plan, w_gate_up, w_down, deterministic=deterministic)


def route(
    router_logits: torch.Tensor,
    allowed: torch.Tensor | None,
    *,
    top_k: int,
    router_bias: torch.Tensor | None = None,
    renormalize: bool = False,
    empty: int = NO_EXPERT,
) -> RoutingPlan:
    """The K best of each token's allowed experts, with their weights; equal ones by lower index.

    `router_logits` [T, E]; `allowed` [T] int64 or, for logits from `mask_logits`, None: an excluded
    expert's is -inf then, and a bias is in them already. The weights are the softmax over the
    allowed experts alone, as if the other rows did not exist; `renormalize` makes those of the
    chosen sum to 1. A slot that names no expert names `empty`.

    Raises InputError for a shape, dtype or device that doesn't fit.
    """
    check_routing(router_logits, allowed, top_k, router_bias)
    return _route(router_logits, allowed, top_k, router_bias, renormalize, empty)


def mask_logits(
    router_logits: torch.Tensor,
    allowed: torch.Tensor,
    router_bias: torch.Tensor | None = None,
    *,
    copy: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first half of `route`: logits [T, E] float32, -inf where a token may not consult.

    They are written to `copy` too, [T, E] float32 and contiguous: a GPU does both in one kernel.

    Raises InputError for a shape, dtype or device that doesn't fit.
    """
    check_routing(router_logits, allowed, 1, router_bias)
    if copy is not None:
        check_copy(copy, router_logits)
    if not router_logits.is_cuda:
        masked = routing.mask_logits(router_logits, allowed, router_bias)
        if copy is not None:
            copy.copy_(masked)
        return masked
    from expertgate.kernels.gpu import routing as on_gpu

    return on_gpu.mask_logits(router_logits, allowed, router_bias, copy)


def _route(
    router_logits: torch.Tensor,
    allowed: torch.Tensor | None,
    top_k: int,
    router_bias: torch.Tensor | None,
    renormalize: bool,
    empty: int = NO_EXPERT,
) -> RoutingPlan:
    run = routing.route
    if router_logits.is_cuda:
        from expertgate.kernels.gpu.routing import route as run
    return run(
        router_logits,
        allowed,
        top_k=top_k,
        router_bias=router_bias,
        renormalize=renormalize,
        empty=empty,
    )
