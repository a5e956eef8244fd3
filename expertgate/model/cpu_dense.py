"""Dense layers on x86 processors: fast, and the same bits whatever else is in the batch.

vLLM 0.32 chooses a product by the processor, and some add up in an order that depends on the number
of rows. A request's last bit would then depend on who else is served.

- With AMX: vLLM takes one product for small weights and another for large ones, and the first goes
  another way below five rows. Here every weight is multiplied by the first, never with so few. In
  float32 and float16 there is the other alone, which adds up in another order for a single row, and
  so never has one here.
- Without instructions for bfloat16: vLLM falls back to PyTorch's product, which took 3 to 8 times
  as long as PyTorch's in float32 where it was measured (16 rows; AVX-512). Here these weights are
  kept as float32. Both add up in float32 and round once; only the order of additions differs.
  vLLM's own kernel for float32 is as fast, but keeps a compiled one for each number of rows that it
  ever met: in ten minutes of mixed load a worker grew by 280 MB.
- Any other: as vLLM has it.
"""

import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

log = logging.getLogger(__name__)

_vllms_dispatch = utils.dispatch_cpu_unquantized_gemm

_ROWS = 16
"""In float32, rows are filled up to a multiple of this. The few that are left over would be added
up in another order: on AMD's processors those beyond a multiple of 4, on Intel's with AVX-512 those
of up to 12 rows."""
LEAST_ROWS = 8
"""With AMX there are at least as many. The products have other ways for fewer than five, or two."""
_TILE = (16, 32)
"""With AMX, what a weight's rows and columns must be multiples of."""


@contextmanager
def batch_invariant() -> Iterator[None]:
    """A model that is loaded inside has the products that are described above for AMX."""
    if _has_amx():
        utils.dispatch_cpu_unquantized_gemm = _dispatch
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = _vllms_dispatch


def least_rows() -> int:
    """How many rows, padding included, a step must have of a model that was loaded as above."""
    return LEAST_ROWS if _has_amx() else 1


def _has_amx() -> bool:
    return platform.machine() == "x86_64" and torch.cpu._is_amx_tile_supported()


def _dispatch(layer: Any, remove_weight: bool) -> None:
    """In place of vLLM's function of that name, and with its arguments."""
    weight = layer.weight
    plain = not weight.is_meta and weight.ndim == 2 and weight.dtype == torch.bfloat16
    if not plain or weight.shape[1] % _TILE[1]:
        if plain:
            log.warning(
                "a layer's %d columns are no multiple of %d: the last bit of what it gives may "
                "depend on how many tokens are in the batch",
                weight.shape[1],
                _TILE[1],
            )
        _vllms_dispatch(layer, remove_weight)
        if isinstance(layer, VocabParallelEmbedding):
            layer.cpu_linear = partial(_never_few, layer.cpu_linear)
        return
    rows = len(weight)
    whole = nn.functional.pad(weight.detach(), (0, 0, 0, -rows % _TILE[0]))
    packed = torch.ops._C.convert_weight_packed(whole.contiguous())

    # Only what is outside of the compiled model may look at how many rows there are.
    product = _filled_up if isinstance(layer, VocabParallelEmbedding) else _tiled

    def linear(x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = product(x, packed, rows)
        return out if bias is None else out + bias

    layer.cpu_linear = linear
    if remove_weight:
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)


def _tiled(x: torch.Tensor, packed: torch.Tensor, width: int) -> torch.Tensor:
    """`x` [..., I] bfloat16, `packed` a weight of `width` rows or a few more → [..., width]."""
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(rows), packed.shape[0])
    torch.ops._C.weight_packed_linear(out, rows, packed, None, True)
    return out[:, :width].view(*x.shape[:-1], width)


def _filled_up(x: torch.Tensor, packed: torch.Tensor, width: int) -> torch.Tensor:
    """As `_tiled`, for any number of rows."""
    return _never_few(_tiled, x, packed, width)


def _never_few(product: Callable[..., torch.Tensor], x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """`product(x, *rest)` of `x` [T, I], which has LEAST_ROWS rows or more there."""
    missing = LEAST_ROWS - x.shape[0]
    if missing <= 0:
        return product(x, *rest)
    return product(nn.functional.pad(x, (0, 0, 0, missing)), *rest)[:-missing]


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; taken for granted where it is no x86."""
    if platform.machine() != "x86_64":
        return True
    return torch.cpu._is_avx512_bf16_supported() or _has_amx()


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
