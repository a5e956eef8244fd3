"""The two grouped matrix products: gate and up with SiLU between them, and down.

Each program takes tiles of one expert's pairs by some columns; which expert that is, it reads from
the groups. Programs without a tile end at once, and an expert without a pair has no tile, so none
of its weights is read. A row is summed in an order that the tile's shape alone decides.

Dimensions: T tokens, E experts, K slots, H hidden, I inner, S parts of a split sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from expertgate.kernels.gpu.grouping import Groups
from expertgate.kernels.gpu.shapes import Device, Tiles


@triton.jit
def _tiles(starts_ptr, E, tiles_n, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each expert [E_PAD]: where its pairs start and end, and the tile behind its last."""
    expert = tl.arange(0, E_PAD)
    starts = tl.load(starts_ptr + expert, mask=expert < E, other=0)
    ends = tl.load(starts_ptr + expert + 1, mask=expert < E, other=0)
    last = tl.cumsum((ends - starts + BLOCK_M - 1) // BLOCK_M * tiles_n, axis=0)
    return starts, ends, last


@triton.jit
def _locate(
    tile,
    starts,
    ends,
    last,
    tiles_n,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile's expert, its first row, its expert's last row + 1, and its place among the columns.

    GROUP_M row tiles run through the columns together, and so share the weights they load.
    """
    expert = tl.sum((last <= tile).to(tl.int32), axis=0)
    this = tl.arange(0, E_PAD) == expert
    start = tl.sum(tl.where(this, starts, 0), axis=0)
    end = tl.sum(tl.where(this, ends, 0), axis=0)
    tiles_m = (end - start + BLOCK_M - 1) // BLOCK_M
    within = tile - tl.sum(tl.where(this, last, 0), axis=0) + tiles_m * tiles_n
    first_m = within // (GROUP_M * tiles_n) * GROUP_M
    group = tl.minimum(tiles_m - first_m, GROUP_M)
    within = within - first_m * tiles_n
    return expert, start + (first_m + within % group) * BLOCK_M, end, within // group


@triton.jit
def _weight_tile(
    w,
    expert,
    height,
    first,
    rows,
    n,
    k,
    depth,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[BLOCK_N, BLOCK_K] of w[expert] [height, depth], from (first + n, k) on.

    `rows`: how many there are from `first` on, of which those behind the last are never stored.
    """
    if DESCRIPTORS:
        # Zeros behind the end of either dimension, so never another expert's.
        out = w.load([expert, first + n, k]).reshape(BLOCK_N, BLOCK_K)
    else:
        # Past the last row it starts anew: still this expert's.
        row = first + (n + tl.arange(0, BLOCK_N)) % rows
        column = k + tl.arange(0, BLOCK_K)
        cells = w + (expert.to(tl.int64) * height + row)[:, None] * depth + column[None, :]
        if EVEN:
            out = tl.load(cells)
        else:
            out = tl.load(cells, mask=(column < depth)[None, :], other=0.0)
    return out


@triton.jit
def _row_tile(x_ptr, row, stride, k, depth, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of the rows `row` [BLOCK_M] of x, from column k on."""
    column = k + tl.arange(0, BLOCK_K)
    cells = x_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    if EVEN:
        out = tl.load(cells)
    else:
        out = tl.load(cells, mask=(column < depth)[None, :], other=0.0)
    return out


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    return out


@triton.jit
def _add_product(x, w, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """`acc` [M, N] plus x [M, K] times the transpose of w [N, K]; with SWAP, `acc` is [N, M]."""
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _gate_up_kernel(
    x_ptr,
    w,
    out_ptr,
    pairs_ptr,
    starts_ptr,
    E,
    H,
    I,
    x_stride,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_n = tl.cdiv(I, BLOCK_N)
    starts, ends, last = _tiles(starts_ptr, E, tiles_n, E_PAD, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tl.max(last, axis=0), tl.num_programs(0)):
        expert, row, end, n = _locate(tile, starts, ends, last, tiles_n, E_PAD, BLOCK_M, GROUP_M)
        n = n * BLOCK_N
        row = row + tl.arange(0, BLOCK_M)
        # Rows behind the last repeat the first pair, and are not stored.
        token = tl.load(pairs_ptr + row, mask=row < end, other=0) // K
        gate = _zeros(BLOCK_M, BLOCK_N, SWAP)
        up = _zeros(BLOCK_M, BLOCK_N, SWAP)
        for k in tl.range(0, H, BLOCK_K):
            x = _row_tile(x_ptr, token, x_stride, k, H, BLOCK_K, EVEN)
            w_gate = _weight_tile(
                w, expert, 2 * I, 0, I, n, k, H, BLOCK_N, BLOCK_K, DESCRIPTORS, EVEN
            )
            w_up = _weight_tile(
                w, expert, 2 * I, I, I, n, k, H, BLOCK_N, BLOCK_K, DESCRIPTORS, EVEN
            )
            gate = _add_product(x, w_gate, gate, SWAP, PRECISION)
            up = _add_product(x, w_up, up, SWAP, PRECISION)
        out = gate / (1.0 + tl.exp(-gate)) * up
        if SWAP:
            out = tl.trans(out)
        column = n + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & (column < I)[None, :]
        cells = out_ptr + row.to(tl.int64)[:, None] * I + column[None, :]
        tl.store(cells, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _down_kernel(
    x,
    w,
    out_ptr,
    pairs_ptr,
    starts_ptr,
    P,
    E,
    H,
    I,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_n = tl.cdiv(H, BLOCK_N) * SPLIT_K
    starts, ends, last = _tiles(starts_ptr, E, tiles_n, E_PAD, BLOCK_M)
    depth = tl.cdiv(tl.cdiv(I, BLOCK_K), SPLIT_K) * BLOCK_K
    for tile in tl.range(tl.program_id(0), tl.max(last, axis=0), tl.num_programs(0)):
        expert, first, end, n = _locate(tile, starts, ends, last, tiles_n, E_PAD, BLOCK_M, GROUP_M)
        part = n % SPLIT_K
        n = n // SPLIT_K * BLOCK_N
        row = first + tl.arange(0, BLOCK_M)
        acc = _zeros(BLOCK_M, BLOCK_N, SWAP)
        for k in tl.range(part * depth, tl.minimum((part + 1) * depth, I), BLOCK_K):
            if DESCRIPTORS:
                x_tile = x.load([first, k])
            else:
                # Rows behind the last repeat the first, and are not stored.
                x_tile = _row_tile(x, tl.where(row < end, row, first), I, k, I, BLOCK_K, EVEN)
            w_tile = _weight_tile(w, expert, H, 0, H, n, k, I, BLOCK_N, BLOCK_K, DESCRIPTORS, EVEN)
            acc = _add_product(x_tile, w_tile, acc, SWAP, PRECISION)
        if SWAP:
            acc = tl.trans(acc)
        # Back from the order of the groups to that of the pairs.
        pair = tl.load(pairs_ptr + row, mask=row < end, other=0)
        column = n + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & (column < H)[None, :]
        cells = out_ptr + (part.to(tl.int64) * P + pair)[:, None] * H + column[None, :]
        tl.store(cells, acc.to(out_ptr.dtype.element_ty), mask=inside)


def gate_up(
    x: torch.Tensor, w_gate_up: torch.Tensor, groups: Groups, K: int, tiles: Tiles
) -> torch.Tensor:
    """silu(gate) * up of every pair, [T*K, I] in x's dtype and in the order of the groups.

    `x` [T, H]; `w_gate_up` [E, 2I, H], contiguous; `K`, how many slots a token has. Rows behind the
    last group are not written.
    """
    E, I2, H = w_gate_up.shape
    I = I2 // 2
    out = x.new_empty((len(groups.pairs), I))
    _gate_up_kernel[_grid(len(out), E, I, tiles, x.device)](
        x,
        _weights(w_gate_up, tiles),
        out,
        groups.pairs,
        groups.starts,
        E,
        H,
        I,
        x.stride(0),
        K=K,
        EVEN=H % tiles.block_k == 0,
        **_constants(E, tiles, x.dtype),
    )
    return out


def down(inner: torch.Tensor, w_down: torch.Tensor, groups: Groups, tiles: Tiles) -> torch.Tensor:
    """Each pair's output, [S, T*K, H] in the order of the pairs: S parts, whose sum it is.

    `inner` [T*K, I], in the order of the groups; `w_down` [E, H, I], contiguous. In float32 where
    S > 1, else in the dtype of `inner`. Rows of pairs that are in no group are not written.
    """
    E, H, I = w_down.shape
    P, S = len(inner), tiles.split_k
    out = inner.new_empty((S, P, H), dtype=torch.float32 if S > 1 else inner.dtype)
    rows: torch.Tensor | TensorDescriptor = inner
    if tiles.descriptors:
        rows = TensorDescriptor.from_tensor(inner, [tiles.block_m, tiles.block_k])
    _down_kernel[_grid(P, E, H, tiles, inner.device)](
        rows,
        _weights(w_down, tiles),
        out,
        groups.pairs,
        groups.starts,
        P,
        E,
        H,
        I,
        EVEN=I % tiles.block_k == 0,
        SPLIT_K=S,
        **_constants(E, tiles, inner.dtype),
    )
    return out


def _weights(w: torch.Tensor, tiles: Tiles) -> torch.Tensor | TensorDescriptor:
    if not tiles.descriptors:
        return w
    return TensorDescriptor.from_tensor(w, [1, tiles.block_n, tiles.block_k])


def _grid(P: int, E: int, columns: int, tiles: Tiles, device: torch.device) -> tuple[int]:
    """As many programs as there could be tiles, or as stay on the device if those are fewer."""
    # The worst case: each expert that is hit leaves one tile unfilled.
    tiles_m = min(E, P) + P // tiles.block_m
    most = tiles_m * triton.cdiv(columns, tiles.block_n) * tiles.split_k
    if tiles.programs_per_sm:
        most = min(most, tiles.programs_per_sm * Device.of(device).multiprocessors)
    return (most,)


def _constants(E: int, tiles: Tiles, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "E_PAD": max(triton.next_power_of_2(E), 2),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "GROUP_M": tiles.group_m,
        "SWAP": tiles.swap,
        "DESCRIPTORS": tiles.descriptors,
        # TensorFloat-32 would keep 10 bits of a float32's 23.
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
