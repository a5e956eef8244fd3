"""Grouping the (token, expert) pairs of a plan by expert: a count and a scan.

The pairs of one expert keep the order of their tokens. Nothing is added up by atomics, so the same
plan always gives the same groups; and nothing is read back, so the host never waits.

Dimensions: T tokens, E experts, K slots.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Cells of a program's table of tokens by experts: what fits its registers.
_CELLS = 4096


class Groups(NamedTuple):
    """`pairs` [T*K] int32: pair token*K + slot, grouped by expert; what follows the last is unset.

    `starts` [E+1] int32: where each expert's pairs start, and where the last one's end. Slots that
    name no expert are in no group.
    """

    pairs: torch.Tensor
    starts: torch.Tensor


@triton.jit
def _chosen(experts_ptr, token, expert, T, K: tl.constexpr):
    """Two tables [BLOCK_T, E_PAD] int32: whether a token chose an expert, and in which slot."""
    place = token.to(tl.int64) * K
    chosen = (token[:, None] < 0) & (expert[None, :] < 0)
    slots = chosen.to(tl.int32)
    for slot in tl.static_range(K):
        named = tl.load(experts_ptr + place + slot, mask=token < T, other=-1)
        here = named.to(tl.int32)[:, None] == expert[None, :]
        chosen |= here
        slots = tl.where(here, slot, slots)
    return chosen.to(tl.int32), slots


@triton.jit
def _count_kernel(
    experts_ptr,
    counts_ptr,
    T,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    block = tl.program_id(0)
    expert = tl.arange(0, E_PAD)
    chosen, _ = _chosen(experts_ptr, block * BLOCK_T + tl.arange(0, BLOCK_T), expert, T, K)
    tl.store(counts_ptr + block * E_PAD + expert, tl.sum(chosen, axis=0))


@triton.jit
def _place_kernel(
    experts_ptr,
    counts_ptr,
    pairs_ptr,
    starts_ptr,
    T,
    E,
    blocks,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    COUNTED: tl.constexpr,
):
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, E_PAD)
    chosen, slots = _chosen(experts_ptr, token, expert, T, K)
    # Of each expert: its pairs in all, and in the blocks before this one.
    total = tl.sum(chosen, axis=0)
    before = tl.zeros([E_PAD], tl.int32)
    if COUNTED:
        total = tl.zeros([E_PAD], tl.int32)
        for first in tl.range(0, blocks, BLOCK_B):
            other = first + tl.arange(0, BLOCK_B)
            cells = counts_ptr + other[:, None] * E_PAD + expert[None, :]
            counts = tl.load(cells, mask=(other < blocks)[:, None], other=0)
            total += tl.sum(counts, axis=0)
            before += tl.sum(tl.where((other < block)[:, None], counts, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    starts = ends - total
    if block == 0:
        tl.store(starts_ptr + expert, starts, mask=expert < E)
        tl.store(starts_ptr + expert + 1, ends, mask=expert == E - 1)
    # A token's place among its expert's: behind all that chose it before.
    place = (starts + before)[None, :] + tl.cumsum(chosen, axis=0) - chosen
    tl.store(pairs_ptr + place, token[:, None] * K + slots, mask=chosen == 1)


def group(experts: torch.Tensor, num_experts: int) -> Groups:
    """Groups `experts` [T, K], integers; any that is not one of 0..E-1 names none. T must not be 0.

    An expert may stand in one slot of a token only.
    """
    T, K = experts.shape
    assert T > 0, "no token, so no program to write the starts"
    pairs = torch.empty(T * K, dtype=torch.int32, device=experts.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=experts.device)
    e_pad = max(triton.next_power_of_2(num_experts), 2)
    block_t = min(max(triton.next_power_of_2(T), 2), _CELLS // e_pad)
    blocks = triton.cdiv(T, block_t)
    counts = None
    if blocks > 1:
        counts = torch.empty((blocks, e_pad), dtype=torch.int32, device=experts.device)
        _count_kernel[(blocks,)](experts, counts, T, K=K, E_PAD=e_pad, BLOCK_T=block_t, num_warps=8)
    _place_kernel[(blocks,)](
        experts,
        counts,
        pairs,
        starts,
        T,
        num_experts,
        blocks,
        K=K,
        E_PAD=e_pad,
        BLOCK_T=block_t,
        BLOCK_B=max(1024 // e_pad, 2),
        COUNTED=blocks > 1,
        num_warps=8,
    )
    return Groups(pairs, starts)
