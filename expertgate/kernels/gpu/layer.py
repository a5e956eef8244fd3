"""The masked layer: plan, groups, two products, combine.

Dimensions: T tokens, E experts, K slots, H hidden, I inner.
"""

import torch

from expertgate.kernels.gpu.combine import combine
from expertgate.kernels.gpu.grouping import group
from expertgate.kernels.gpu.products import down, gate_up
from expertgate.kernels.gpu.shapes import Device, Shape, choose
from expertgate.kernels.routing import RoutingPlan


def experts(
    x: torch.Tensor,
    plan: RoutingPlan,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    deterministic: bool = False,
    shape: Shape | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H] in x's dtype; arguments as `masked_moe` has them, and `plan` of T tokens.

    `plan` may have integers of any width, and names no expert by any that isn't one. `shape`: how
    to cut the work, in the place of the choice by T. `out` [T, H], contiguous, is written if given.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    if out is None:
        out = x.new_empty(x.shape)
    if not len(x):
        return out
    E, H, I = w_down.shape
    if shape is None:
        device = Device.of(x.device)
        shape = choose(device, T=len(x), E=E, H=H, I=I, dtype=x.dtype, deterministic=deterministic)
    groups = group(plan.experts, E)
    inner = gate_up(x, w_gate_up, groups, plan.experts.shape[1], shape.gate_up)
    combine(down(inner, w_down, groups, shape.down), plan, out)
    return out
