"""The obvious loop equals the layer with the experts deleted, and reads no excluded weight."""

import pytest
import torch

from expertgate.kernels.reference import masked_moe

T, E, H, INNER, TOP_K = 11, 5, 32, 48, 3


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return draw(T, H), draw(T, E), draw(E, 2 * INNER, H) / 6, draw(E, H, INNER) / 7


@pytest.mark.parametrize("mask", range(1, 2**E))
def test_equals_the_layer_with_the_experts_deleted(layer, mask):
    x, logits, w_gate_up, w_down = layer
    kept = [e for e in range(E) if mask >> e & 1]
    everything = torch.full((T,), (1 << len(kept)) - 1)
    deleted = masked_moe(x, logits[:, kept], w_gate_up[kept], w_down[kept], everything, top_k=TOP_K)
    masked = masked_moe(x, logits, w_gate_up, w_down, torch.full((T,), mask), top_k=TOP_K)
    # The same float32 products and sums in the same order; only the softmax is over other rows.
    torch.testing.assert_close(masked, deleted, rtol=1e-5, atol=1e-6)


def test_excluded_weights_are_never_read(layer):
    x, logits, w_gate_up, w_down = layer
    allowed = torch.tensor([0b00011, 0b00001] * 5 + [0b00010])
    clean = masked_moe(x, logits, w_gate_up, w_down, allowed, top_k=TOP_K)
    for tensor in (w_gate_up, w_down):
        tensor[2:] = torch.nan
    logits[:, 2:] = torch.nan
    assert torch.equal(masked_moe(x, logits, w_gate_up, w_down, allowed, top_k=TOP_K), clean)


def test_an_empty_mask_gives_zeros(layer):
    allowed = torch.zeros(T, dtype=torch.int64)
    assert torch.equal(masked_moe(*layer, allowed, top_k=TOP_K), torch.zeros(T, H))


def test_no_token_is_no_error(layer):
    x, logits, w_gate_up, w_down = layer
    none = torch.zeros(0, dtype=torch.int64)
    assert masked_moe(x[:0], logits[:0], w_gate_up, w_down, none, top_k=TOP_K).shape == (0, H)
