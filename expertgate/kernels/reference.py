"""The masked mixture-of-experts layer as the obvious loop: what every faster path must equal.

Dimensions: T tokens, E experts, K = top_k slots, H hidden, I inner.
"""

import torch
import torch.nn.functional as F

from expertgate.kernels.routing import RoutingPlan, route


def masked_moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    allowed: torch.Tensor,
    *,
    top_k: int,
    router_bias: torch.Tensor | None = None,
    renormalize: bool = False,
) -> torch.Tensor:
    """Sums each token's allowed experts' FFNs, by their routing weights; [T, H] in x's dtype.

    `x` [T, H]; `router_logits` [T, E]; `w_gate_up` [E, 2I, H], gate before up; `w_down` [E, H, I];
    `allowed` [T] int64, bit e set = expert e may be consulted; `router_bias` [E-1] for experts 1..
    A token with an empty mask gives zeros. Products are made in x's dtype, sums in float32.
    """
    plan = route(
        router_logits, allowed, top_k=top_k, router_bias=router_bias, renormalize=renormalize
    )
    return experts(x, plan, w_gate_up, w_down)


def experts(
    x: torch.Tensor, plan: RoutingPlan, w_gate_up: torch.Tensor, w_down: torch.Tensor
) -> torch.Tensor:
    """What follows the routing; [T, H] in x's dtype. `plan` of T tokens, the rest as above."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(w_gate_up.shape[0]):
        tokens, slots = torch.nonzero(plan.experts == expert, as_tuple=True)
        if not len(tokens):
            continue  # an expert that nobody consults is not read at all
        gate, up = F.linear(x[tokens], w_gate_up[expert]).chunk(2, dim=-1)
        down = F.linear(F.silu(gate) * up, w_down[expert])
        out[tokens] += down.float() * plan.weights[tokens, slots, None]
    return out.to(x.dtype)
