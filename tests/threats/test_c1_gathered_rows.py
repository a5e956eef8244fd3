"""c1: some layers gather other ranks' rows before they route, so row i is no longer token i."""

from types import SimpleNamespace

import torch
from vllm.forward_context import override_forward_context

from expertgate.kernels.routing import NO_EXPERT
from expertgate.model.experts import MaskedRouter
from expertgate.model.flex_olmo import FlexOlmoMoE
from expertgate.model.masks import TokenMasks

T, E, H = 6, 7, 8
NAME = "model.layers.0.mlp"


def layer(masks):
    """A layer whose experts only record the logits they are given."""
    made = object.__new__(FlexOlmoMoE)
    torch.nn.Module.__init__(made)
    made.masks, made.prefix, made.router_bias = masks, NAME, None
    made.ledger_part = torch.empty(T, E)
    weight = torch.randn(E, H, generator=torch.Generator().manual_seed(0))
    made.__dict__["gate"] = lambda x: (x @ weight.T, None)
    made.seen = []
    made.__dict__["experts"] = lambda hidden_states, router_logits: made.seen.append(router_logits)
    return made


def logits_of(made, x):
    context = SimpleNamespace(no_compile_layers={NAME: made})
    with override_forward_context(context):
        made(x)
    return made.seen[-1]


def test_the_row_carries_its_mask_wherever_it_goes():
    masks = TokenMasks(16, torch.device("cpu"))
    words = torch.tensor([1, 127, 0b101, 1 << 6, 0b11, 0b1111000])
    masks.arm(words, torch.arange(T + 1), T)
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(1))
    logits = logits_of(layer(masks), x)
    masks.rest()

    router = MaskedRouter(top_k=5, num_experts=E, renormalize=False)
    moved = torch.tensor([4, 2, 0, 5, 1, 3])
    _, experts = router.select_experts(x[moved], logits[moved])
    for row, token in enumerate(moved.tolist()):
        chosen = {e for e in experts[row].tolist() if e != NO_EXPERT}
        allowed = {e for e in range(E) if int(words[token]) >> e & 1}
        assert chosen
        assert chosen <= allowed
        assert len(chosen) == min(5, len(allowed))
