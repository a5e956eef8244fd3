"""Summing each token's outputs by their routing weights.

Dimensions: T tokens, K slots, H hidden, S parts of a split sum.
"""

import torch
import triton
import triton.language as tl

from expertgate.kernels.routing import RoutingPlan


@triton.jit
def _combine_kernel(
    parts_ptr,
    weights_ptr,
    experts_ptr,
    out_ptr,
    P,
    H,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros([BLOCK_H], tl.float32)
    for slot in tl.static_range(K):
        pair = token.to(tl.int64) * K + slot
        # A slot without an expert has no output: what stands there was never written.
        inside = column < tl.where(tl.load(experts_ptr + pair) >= 0, H, 0)
        value = tl.zeros([BLOCK_H], tl.float32)
        for part in tl.static_range(S):
            cells = parts_ptr + (pair + part * P) * H + column
            value += tl.load(cells, mask=inside, other=0.0).to(tl.float32)
        acc += tl.load(weights_ptr + pair) * value
    cells = out_ptr + token.to(tl.int64) * H + column
    tl.store(cells, acc.to(out_ptr.dtype.element_ty), mask=column < H)


def combine(parts: torch.Tensor, plan: RoutingPlan, out: torch.Tensor) -> None:
    """Writes each token's sum over slots, in their order, of weight times the sum of S parts.

    `parts` [S, T*K, H], S parts of each pair's output; `plan` of T tokens; `out` [T, H].
    """
    S, P, H = parts.shape
    block_h = min(triton.next_power_of_2(H), 512)
    _combine_kernel[(len(out), triton.cdiv(H, block_h))](
        parts,
        plan.weights,
        plan.experts,
        out,
        P,
        H,
        K=plan.experts.shape[1],
        S=S,
        BLOCK_H=block_h,
        num_warps=4,
    )
