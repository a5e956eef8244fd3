"""Random layers, and the oracle: the obvious loop in float64, with a bound on what rounding does.

Dimensions: T tokens, E experts, K slots, H hidden, I inner.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from expertgate.kernels import reference, routing

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def words(masks):
    """Masks as the two's complement that an int64 tensor holds."""
    return torch.tensor([m - 2**64 if m >= 2**63 else m for m in masks], dtype=torch.int64)


@dataclass
class Case:
    x: torch.Tensor
    router_logits: torch.Tensor
    w_gate_up: torch.Tensor
    w_down: torch.Tensor
    allowed: torch.Tensor
    router_bias: torch.Tensor | None
    top_k: int
    renormalize: bool

    @property
    def tensors(self):
        return self.x, self.router_logits, self.w_gate_up, self.w_down, self.allowed

    @property
    def options(self):
        return {
            "top_k": self.top_k,
            "router_bias": self.router_bias,
            "renormalize": self.renormalize,
        }

    def plan(self):
        return routing.route(self.router_logits, self.allowed, **self.options)

    def tokens(self, which):
        """The same layer with some of its tokens."""
        return Case(
            self.x[which],
            self.router_logits[which],
            self.w_gate_up,
            self.w_down,
            self.allowed[which],
            self.router_bias,
            self.top_k,
            self.renormalize,
        )

    def to(self, device):
        moved = [t.to(device) for t in self.tensors]
        bias = None if self.router_bias is None else self.router_bias.to(device)
        return Case(*moved, bias, self.top_k, self.renormalize)

    def without(self, experts):
        """The same layer with NaN for all weights of these experts."""
        gate_up, down = self.w_gate_up.clone(), self.w_down.clone()
        gate_up[experts] = torch.nan
        down[experts] = torch.nan
        return Case(
            self.x,
            self.router_logits,
            gate_up,
            down,
            self.allowed,
            self.router_bias,
            self.top_k,
            self.renormalize,
        )

    def outside(self):
        """The experts that no token may consult."""
        together = 0
        for word in self.allowed.tolist():
            together |= word
        return [e for e in range(len(self.w_down)) if not together >> e & 1]

    def check(self, out):
        """Asserts that `out` is the layer's result, as exactly as its dtype can say it."""
        want = reference.masked_moe(
            self.x.double(),
            self.router_logits,
            self.w_gate_up.double(),
            self.w_down.double(),
            self.allowed,
            **self.options,
        )
        assert out.dtype is self.x.dtype
        error = (out.double() - want).abs()
        wrong = ~(error <= self._bound())
        assert not wrong.any(), (error / self._bound()).max()

    def _bound(self):
        """[T, H]: how far rounding alone may lead.

        With u the dtype's unit roundoff: gate, up, their product, down and the sum over experts are
        each rounded at most once to the dtype (the loop rounds all five, the kernels fewer), and
        every such rounding moves the result by at most u times the sum of its terms' absolute
        values. Summing n terms in float32 adds n of its roundoffs; there are H, I and K such terms,
        and the exponentials of router and SiLU are good to a few. All is a bound to first order, so
        it is doubled.
        """
        u = torch.finfo(self.x.dtype).eps / 2
        H, I = self.w_down.shape[1:]
        plan = self.plan()
        x = self.x.double().abs()
        most = torch.zeros(x.shape, dtype=torch.float64)
        for expert in range(len(self.w_down)):
            tokens, slots = torch.nonzero(plan.experts == expert, as_tuple=True)
            # Of silu's slope, 1.1 is the steepest.
            gate, up = (x[tokens] @ self.w_gate_up[expert].double().abs().T).chunk(2, dim=-1)
            down = (1.1 * gate * up) @ self.w_down[expert].double().abs().T
            most[tokens] += down * plan.weights[tokens, slots, None].double()
        return 2 * (5 * u + (H + I + 32) * 2**-24) * most + 2**-24


def _make(seed, T, E, H, I, dtype, masks, top_k, biased, renormalize):
    chance = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=chance)

    return Case(
        x=draw(T, H).to(dtype),
        router_logits=(2 * draw(T, E)).to(dtype),
        w_gate_up=(draw(E, 2 * I, H) / H**0.5).to(dtype),
        w_down=(draw(E, H, I) / I**0.5).to(dtype),
        allowed=words(masks),
        router_bias=draw(E - 1) if biased else None,
        top_k=top_k,
        renormalize=renormalize,
    )


@st.composite
def layers(draw, *, T=(1, 5), E=(1, 2, 4), sizes=(16, 48, 80)):
    """A layer of a few tokens, each with a mask of its own, from empty to full."""
    tokens, experts = draw(st.integers(*T)), draw(st.sampled_from(E))
    mask = st.one_of(st.sampled_from([0, 1, 2**experts - 1]), st.integers(0, 2**experts - 1))
    return _make(
        seed=draw(st.integers(0, 2**31)),
        T=tokens,
        E=experts,
        H=draw(st.sampled_from(sizes)),
        I=draw(st.sampled_from(sizes)),
        dtype=draw(st.sampled_from(DTYPES)),
        masks=draw(st.lists(mask, min_size=tokens, max_size=tokens)),
        top_k=draw(st.integers(1, 4)),
        biased=draw(st.booleans()),
        renormalize=draw(st.booleans()),
    )


def layer(*, T, E=7, H=64, I=96, dtype=torch.float32, masks=None, top_k=5, seed=0):
    """One layer of these sizes; every expert allowed unless `masks` says otherwise."""
    masks = [2**E - 1] * T if masks is None else masks
    return _make(seed, T, E, H, I, dtype, masks, top_k, biased=False, renormalize=False)
