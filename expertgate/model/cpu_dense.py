"""Dense layers on processors that can't multiply bfloat16.

There vLLM finds no kernel for bfloat16 and falls back to PyTorch's product, which took 3 to 8 times
as long as PyTorch's in float32 where it was measured (16 rows; AVX-512 without its bfloat16
instructions). Both add up in float32 and round once; only the order of additions differs.

vLLM's own kernel for float32 is as fast, but keeps a compiled one for each number of rows that it
ever met: in ten minutes of mixed load a worker grew by 280 MB.
"""

import logging
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

log = logging.getLogger(__name__)

_ROWS = 4
"""Rows are filled up to a multiple of this. The few that are left over would be added up in another
order, and a token's result would depend on how many others are in the batch."""


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; taken for granted where it is no x86."""
    if platform.machine() != "x86_64":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def widen(model: nn.Module) -> None:
    """Keeps the attention's and the head's bfloat16 weights as float32, for twice the memory.

    Routers and experts stay as they are, and so does what is quantised.
    """
    values = 0
    for layer in _dense(model):
        values += layer.weight.numel()
        layer.weight = nn.Parameter(layer.weight.float(), requires_grad=False)
        layer.cpu_linear = _linear
    if values:
        log.info(
            "this processor multiplies no bfloat16: %.1f M dense weights are kept as float32",
            values / 1e6,
        )


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x` [..., I] bfloat16, `weight` [O, I] float32 → [..., O] bfloat16.

    Without a branch on the number of rows: vLLM's compiler would keep the one that it saw.
    """
    rows = x.reshape(-1, x.shape[-1])
    whole = nn.functional.pad(rows.float(), (0, 0, 0, -len(rows) % _ROWS))
    wide = nn.functional.linear(whole, weight, None if bias is None else bias.float())
    return wide[: len(rows)].to(x.dtype).view(*x.shape[:-1], len(weight))


def _dense(model: nn.Module) -> Iterator[Any]:
    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    for layer in model.modules():
        if not isinstance(layer, (LinearBase, ParallelLMHead)) or isinstance(layer, GateLinear):
            continue
        if isinstance(layer.quant_method, plain) and layer.weight.dtype == torch.bfloat16:
            yield layer
