"""Masking, softmax, top-k and weights in one kernel.

Dimensions: T tokens, E experts (at most 64), K = min(top_k, E) slots.
"""

import torch
import triton
import triton.language as tl

from expertgate.kernels.routing import NO_EXPERT, RoutingPlan

# Tokens of one program. One constant for every T, because the order in which a token's weights
# are summed may depend on it.
_BLOCK_T = 32


@triton.jit
def _masked_logits(
    logits_ptr,
    allowed_ptr,
    bias_ptr,
    token,
    expert,
    T,
    E,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """[BLOCK_T, E_PAD] float32: -inf where a token may not consult, or there is no such expert."""
    inside = (token < T)[:, None] & (expert < E)[None, :]
    offset = token.to(tl.int64)[:, None] * E + expert[None, :]
    logits = tl.load(logits_ptr + offset, mask=inside, other=float("-inf")).to(tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + expert - 1, mask=(expert > 0) & (expert < E), other=0.0)
        bias = bias.to(tl.float32)
        # Not tl.minimum, which would drop a NaN.
        logits += tl.where(bias > 0.0, 0.0, bias)[None, :]
    if MASKED:
        words = tl.load(allowed_ptr + token, mask=token < T, other=0)
        bits = (words[:, None] >> expert.to(tl.int64)[None, :]) & 1
        # Replaced, not added to: a NaN among the excluded goes nowhere.
        logits = tl.where(bits == 1, logits, float("-inf"))
    return logits


@triton.jit
def _mask_kernel(
    logits_ptr,
    allowed_ptr,
    bias_ptr,
    out_ptr,
    copy_ptr,
    T,
    E,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BIASED: tl.constexpr,
    COPIED: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, E_PAD)
    logits = _masked_logits(logits_ptr, allowed_ptr, bias_ptr, token, expert, T, E, True, BIASED)
    inside = (token < T)[:, None] & (expert < E)[None, :]
    offset = token.to(tl.int64)[:, None] * E + expert[None, :]
    tl.store(out_ptr + offset, logits, mask=inside)
    if COPIED:
        tl.store(copy_ptr + offset, logits, mask=inside)


@triton.jit
def _route_kernel(
    logits_ptr,
    allowed_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    T,
    E,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TINY: tl.constexpr,
    EMPTY: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, E_PAD)
    logits = _masked_logits(logits_ptr, allowed_ptr, bias_ptr, token, expert, T, E, MASKED, BIASED)
    excluded = logits == float("-inf")

    # Float bits as integers of the same order, so that NaN has a place in it: the first, as when
    # torch sorts. -0.0 ties with 0.0. An excluded expert's key is lower than any number's.
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(logits != logits, 0x7FFFFFFF, key)
    key = tl.where(excluded, -0x80000000, key)
    # The lower index wins a tie; a key and its expert are found by one maximum.
    ranked = key.to(tl.int64) * 64 + (63 - expert.to(tl.int64))[None, :]
    none = tl.full([1], -0x80000000, tl.int64) * 64 + 63  # the highest that an excluded one has

    highest = tl.max(tl.where(excluded, float("-inf"), logits), axis=1)
    exponentials = tl.where(excluded, 0.0, tl.exp(logits - highest[:, None]))
    weights = exponentials / tl.sum(exponentials, axis=1)[:, None]

    total = tl.zeros([BLOCK_T], tl.float32)
    if RENORMALIZE:
        left = ranked
        for _ in tl.static_range(K):
            best = tl.max(left, axis=1)
            taken = (left == best[:, None]) & (best > none)[:, None]
            total += tl.sum(tl.where(taken, weights, 0.0), axis=1)
            left = tl.where(taken, none[:, None], left)
        # As torch's clamp_min, which keeps a NaN.
        total = tl.where(total < TINY, TINY, total)

    for slot in tl.static_range(K):
        best = tl.max(ranked, axis=1)
        found = best > none
        taken = (ranked == best[:, None]) & found[:, None]
        weight = tl.sum(tl.where(taken, weights, 0.0), axis=1)
        if RENORMALIZE:
            weight = weight / total
        index = tl.where(found, 63 - (best & 63), EMPTY).to(tl.int32)
        place = token.to(tl.int64) * K + slot
        tl.store(weights_ptr + place, tl.where(found, weight, 0.0), mask=token < T)
        tl.store(experts_ptr + place, index, mask=token < T)
        ranked = tl.where(taken, none[:, None], ranked)


def mask_logits(
    router_logits: torch.Tensor,
    allowed: torch.Tensor,
    router_bias: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> torch.Tensor:
    """`expertgate.kernels.mask_logits` in one kernel."""
    T, E = router_logits.shape
    out = torch.empty((T, E), dtype=torch.float32, device=router_logits.device)
    if T:
        _mask_kernel[(triton.cdiv(T, _BLOCK_T),)](
            router_logits.contiguous(),
            allowed.contiguous(),
            _contiguous(router_bias),
            out,
            copy,
            T,
            E,
            E_PAD=_padded(E),
            BLOCK_T=_BLOCK_T,
            BIASED=router_bias is not None,
            COPIED=copy is not None,
        )
    return out


def route(
    router_logits: torch.Tensor,
    allowed: torch.Tensor | None,
    *,
    top_k: int,
    router_bias: torch.Tensor | None = None,
    renormalize: bool = False,
    empty: int = NO_EXPERT,
) -> RoutingPlan:
    """`expertgate.kernels.route` in one kernel."""
    T, E = router_logits.shape
    K = min(top_k, E)
    weights = torch.empty((T, K), dtype=torch.float32, device=router_logits.device)
    experts = torch.empty((T, K), dtype=torch.int32, device=router_logits.device)
    if T:
        _route_kernel[(triton.cdiv(T, _BLOCK_T),)](
            router_logits.contiguous(),
            _contiguous(allowed),
            _contiguous(router_bias),
            weights,
            experts,
            T,
            E,
            K=K,
            E_PAD=_padded(E),
            BLOCK_T=_BLOCK_T,
            MASKED=allowed is not None,
            BIASED=router_bias is not None,
            RENORMALIZE=renormalize,
            TINY=torch.finfo(torch.float32).tiny,
            EMPTY=empty,
        )
    return RoutingPlan(weights, experts)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _padded(E: int) -> int:
    return max(1 << (E - 1).bit_length(), 2)
