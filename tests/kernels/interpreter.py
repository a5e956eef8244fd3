"""Gives Triton's interpreter what a GPU has: products of bfloat16 and FP8, rows that stand alone.

Its `tl.dot` multiplies the bits of either as if they were an integer, and leaves the sum to a
BLAS, where a row's last bits depend on where in the tile it stands. Here each product is added to
the accumulator by itself, one after the other, as a matrix unit does for one element.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend(monkeypatch: Any) -> None:
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot)


def _dot(self, a, b, d, *_):
    left, right, out = _numbers(a), _numbers(b), d.data.copy()
    for k in range(left.shape[1]):
        out += left[:, k, None] * right[None, k]
    return TensorHandle(out, d.dtype.scalar)


def _numbers(handle):
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    if handle.dtype.scalar == tl.float8e4nv:
        return torch.from_numpy(handle.data).view(torch.float8_e4m3fn).float().numpy()
    return handle.data.astype(np.float32)
