"""Dense layers on processors that can't multiply bfloat16.

There vLLM finds no kernel for bfloat16 and falls back to PyTorch's product, which took 3 to 11
times as long as vLLM's kernel for float32 where it was measured (16 rows; AVX-512 without its
bfloat16 instructions). Both add up in float32 and round once; only the order of additions differs.
"""

import functools
import logging
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

log = logging.getLogger(__name__)


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; taken for granted where it is no x86."""
    if platform.machine() != "x86_64":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def widen(model: nn.Module) -> None:
    """Gives the attention's and the head's bfloat16 weights to vLLM's kernel as float32.

    Routers and experts stay as they are, and so does what is quantised.
    """
    values = 0
    for layer in _dense(model):
        values += layer.weight.numel()
        layer.weight = nn.Parameter(layer.weight.float(), requires_grad=False)
        # The kernel has a copy of its own. A head's weight stays, since vLLM looks at its dtype.
        dispatch_cpu_unquantized_gemm(layer, remove_weight=isinstance(layer, LinearBase))
        layer.cpu_linear = functools.partial(_rounded, layer.cpu_linear)
    log.info(
        "this processor multiplies no bfloat16: %.1f M dense weights are kept as float32",
        values / 1e6,
    )


def _rounded(
    linear: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear` takes and gives float32; `x` and the result are bfloat16."""
    return linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def _dense(model: nn.Module) -> Iterator[Any]:
    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    for layer in model.modules():
        if not isinstance(layer, (LinearBase, ParallelLMHead)) or isinstance(layer, GateLinear):
            continue
        if isinstance(layer.quant_method, plain) and layer.weight.dtype == torch.bfloat16:
            yield layer
