"""Dense layers on CPUs: what they give, to whomever, and which they are."""

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

from expertgate.model.cpu_dense import LEAST_ROWS, batch_invariant, multiplies_bfloat16, widen

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's kernels for CPUs")

with_amx = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="needs a processor with AMX"
)
in_float32 = pytest.mark.skipif(
    multiplies_bfloat16(), reason="needs a processor that multiplies no bfloat16"
)
ROWS = (*range(1, 34), 64, 127, 128, 256)

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


def packed(kind, weight, *, bias=None):
    layer = layer_of(kind, weight)
    with batch_invariant():
        layer.quant_method.process_weights_after_loading(layer)
    return lambda x: cpu_unquantized_gemm(layer, x, layer.weight, bias)


@with_amx
@pytest.mark.parametrize("kind", [RowParallelLinear, ParallelLMHead, GateLinear])
@pytest.mark.parametrize("outputs", [7, 40, 384])
def test_with_amx_a_product_is_rounded_once(kind, outputs):
    weight, x = random(outputs, 128), random(33, 128, seed=1)
    few = (x[:1], x[:0]) if kind is ParallelLMHead else (x[:LEAST_ROWS], x.view(3, 11, 128))
    for some in (x, *few):
        got = packed(kind, weight)(some)
        assert got.dtype == torch.bfloat16
        exact = nn.functional.linear(some.double(), weight.double())
        size = nn.functional.linear(some.double().abs(), weight.double().abs())
        assert got.shape == exact.shape
        assert torch.all((got.double() - exact).abs() <= exact.abs() * 2**-8 + size * 129 * 2**-24)


@with_amx
def test_with_amx_a_bias_is_added():
    weight, x, bias = random(384, 128), random(9, 128, seed=1), random(384, seed=2)
    without, biased = (
        packed(RowParallelLinear, weight)(x),
        packed(RowParallelLinear, weight, bias=bias)(x),
    )
    assert torch.equal(biased, without + bias)


@with_amx
def test_with_amx_what_does_not_fit_is_vllms_and_said(caplog):
    weight, x = random(32, 40), random(5, 40, seed=1)
    got = packed(RowParallelLinear, weight)(x)
    torch.testing.assert_close(got, nn.functional.linear(x, weight))
    assert "40 columns are no multiple of 32" in caplog.text


SHAPES = [(1536, 128), (384, 128), (128, 128), (2304, 768)]


def depends_on_others(product, columns, least=1, dtype=torch.bfloat16):
    """The numbers of rows with which some row's bits differ from those among 300."""
    x = random(300, columns, seed=1, dtype=dtype)
    whole = product(x)
    return [
        rows
        for rows in ROWS
        if rows >= least
        for first in (0, 7)
        if not torch.equal(product(x[first : first + rows]), whole[first : first + rows])
    ]


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="needs AVX-512")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_how_many_others_there_are(shape):
    assert not depends_on_others(widened(RowParallelLinear, random(*shape)), shape[1])


@with_amx
@pytest.mark.parametrize("shape", [*SHAPES, (7, 768), (40, 768), (1536, 256), (4096, 2048)])
def test_with_amx_a_row_does_not_depend_on_how_many_others_there_are(shape):
    weight = random(*shape)
    assert not depends_on_others(packed(RowParallelLinear, weight), shape[1], least=LEAST_ROWS)
    assert not depends_on_others(packed(ParallelLMHead, weight), shape[1])


@with_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_with_amx_the_head_never_has_a_single_row(dtype):
    """In steps, as in other layers' products, there are never so few."""
    weight = random(384, 2048, dtype=dtype)
    head, other = packed(ParallelLMHead, weight), packed(RowParallelLinear, weight)
    assert not depends_on_others(head, 2048, dtype=dtype)
    assert not depends_on_others(other, 2048, least=LEAST_ROWS, dtype=dtype)


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
