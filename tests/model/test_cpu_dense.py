"""Dense layers in float32 on processors without bfloat16: what they give, and which they are."""

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.utils import cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from expertgate.model.cpu_dense import widen

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's kernels for CPUs")

METHODS = {
    RowParallelLinear: UnquantizedLinearMethod,
    ParallelLMHead: UnquantizedEmbeddingMethod,
    VocabParallelEmbedding: UnquantizedEmbeddingMethod,
    GateLinear: UnquantizedLinearMethod,
}


def layer_of(kind, weight, method=None):
    """A layer of vLLM's with this weight, without the process groups that it else asks for."""
    layer = object.__new__(kind)
    nn.Module.__init__(layer)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.quant_method = object.__new__(method or METHODS[kind])
    return layer


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def widened(kind, weight):
    layer = layer_of(kind, weight)
    widen(nn.ModuleList([layer]))
    return lambda x, bias=None: cpu_unquantized_gemm(layer, x, layer.weight, bias)


@pytest.mark.parametrize("kind", [RowParallelLinear, ParallelLMHead])
@pytest.mark.parametrize("bias", [None, random(384, seed=2)])
def test_a_product_is_rounded_once(kind, bias):
    weight, x = random(384, 128), random(33, 128, seed=1)
    got = widened(kind, weight)(x, bias)
    assert got.dtype == torch.bfloat16
    exact = nn.functional.linear(
        x.double(), weight.double(), bias if bias is None else bias.double()
    )
    size = nn.functional.linear(x.double().abs(), weight.double().abs())
    # Half a unit in the last of bfloat16's 8 bits, and float32's 24 for each of 128 additions.
    assert torch.all((got.double() - exact).abs() <= exact.abs() * 2**-8 + size * 129 * 2**-24)


@pytest.mark.parametrize("shape", [(1536, 128), (384, 128), (128, 128), (2304, 768)])
def test_a_row_does_not_depend_on_how_many_others_there_are(shape):
    product, x = widened(RowParallelLinear, random(*shape)), random(300, shape[1], seed=1)
    whole = product(x)
    for rows in (*range(1, 34), 64, 127, 128, 256):
        assert torch.equal(product(x[:rows]), whole[:rows]), rows
        assert torch.equal(product(x[7 : 7 + rows]), whole[7 : 7 + rows]), rows


def test_routers_embeddings_and_what_is_quantised_stay():
    weight = random(64, 32)
    others = [
        layer_of(GateLinear, weight),
        layer_of(VocabParallelEmbedding, weight),
        layer_of(RowParallelLinear, weight, object),
        layer_of(RowParallelLinear, weight.float()),
    ]
    had = [layer.weight for layer in others]
    widen(nn.ModuleList(others))
    for layer, weight in zip(others, had, strict=True):
        assert layer.weight is weight
        assert "cpu_linear" not in vars(layer)
