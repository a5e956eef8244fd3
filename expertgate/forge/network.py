"""FlexOlmo's forward pass over plain tensors, written for training a few experts at a time.

The shared part and every expert are dictionaries of tensors, so that leaving an expert out is
leaving it out of a list, freezing is `requires_grad`, and merging moves no parameter between
modules. Logits equal those of Hugging Face's FlexOlmoForCausalLM (a test holds that).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes of a network. `top_k` experts at most speak for a token."""

    vocab: int
    hidden: int = 128
    inner: int = 256
    layers: int = 4
    heads: int = 4
    top_k: int = 2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass
class Trace:
    """What a forward pass saw of its experts, one entry a layer.

    `inputs`: [B, T, H], what the router and the experts read. `logits`: [B, T, E] in fp32, biases
    added. `loudness`: [B, T, E], the lengths of the experts' outputs before they are weighted.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    loudness: list[torch.Tensor] = field(default_factory=list)


def new_shared(shape: Shape, generator: torch.Generator) -> Tensors:
    """Everything but the experts, under Hugging Face's names."""
    H = shape.hidden

    def normal(*sizes: int, std: float) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator) * std

    shared = {
        "model.embed_tokens.weight": normal(shape.vocab, H, std=1.0),
        "model.norm.weight": torch.ones(H),
        "lm_head.weight": normal(shape.vocab, H, std=H**-0.5),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shared[f"{prefix}.self_attn.{part}.weight"] = normal(H, H, std=H**-0.5)
        shared[f"{prefix}.self_attn.q_norm.weight"] = torch.ones(H)
        shared[f"{prefix}.self_attn.k_norm.weight"] = torch.ones(H)
        shared[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(H)
        shared[f"{prefix}.post_feedforward_layernorm.weight"] = torch.ones(H)
    return shared


def new_expert(shape: Shape, generator: torch.Generator) -> Tensors:
    """One FFN a layer, with a router row [H] and a bias [] of zeros.

    The public expert's bias stays zero: a checkpoint has biases for experts 1 to n alone.
    """
    H, inner = shape.hidden, shape.inner
    expert: Tensors = {}
    for layer in range(shape.layers):
        expert[f"{layer}.gate_proj"] = torch.randn(inner, H, generator=generator) * H**-0.5
        expert[f"{layer}.up_proj"] = torch.randn(inner, H, generator=generator) * H**-0.5
        expert[f"{layer}.down_proj"] = torch.randn(H, inner, generator=generator) * inner**-0.5
        expert[f"{layer}.row"] = torch.zeros(H)
        expert[f"{layer}.bias"] = torch.zeros(())
    return expert


def forward(
    shape: Shape,
    shared: Tensors,
    experts: Sequence[Tensors],
    ids: torch.Tensor,
    *,
    context: torch.Tensor | None = None,
    where: torch.Tensor | None = None,
    trace: Trace | None = None,
    copies: int = 0,
) -> torch.Tensor:
    """Logits [B, T, V] of the token ids [B, T].

    `experts` are the ones present, the public one first. With `context` [B, T], a token attends
    only to earlier ones of its own number. Positions run on through a row, which rotary embeddings
    don't mind: they know distances alone. With `where` [B, T] bool, the logits are those of its
    true places, [N, V]. `trace` is filled in. In the first `copies` layers all experts are known to
    be copies: the first alone is computed there, and no gradient goes through.
    """
    visible = None
    if context is not None:
        visible = (context[:, None, :, None] == context[:, None, None, :]).tril()
    x = shared["model.embed_tokens.weight"][ids]
    cos, sin = _rotary(shape, ids.shape[1], x.dtype)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        present = experts[:1] if layer < copies else experts
        with torch.set_grad_enabled(torch.is_grad_enabled() and layer >= copies):
            attended = _attention(shape, shared, f"{prefix}.self_attn", x, cos, sin, visible)
            x = x + _norm(shape, attended, shared[f"{prefix}.post_attention_layernorm.weight"])
            mixed = _experts(shape, present, layer, x, trace)
            x = x + _norm(shape, mixed, shared[f"{prefix}.post_feedforward_layernorm.weight"])
    if where is not None:
        x = x[where]
    return linear(_norm(shape, x, shared["model.norm.weight"]), shared["lm_head.weight"])


def _experts(
    shape: Shape, experts: Sequence[Tensors], layer: int, x: torch.Tensor, trace: Trace | None
) -> torch.Tensor:
    """The weighted sum of the top_k experts' FFNs; every one is computed, which few is cheap."""
    rows = torch.stack([expert[f"{layer}.row"] for expert in experts])
    biases = torch.stack([expert[f"{layer}.bias"] for expert in experts])
    # Section 3.3.2: a closed expert's bias may only hold it back.
    logits = linear(x, rows).float() + biases.float().clamp(max=0)
    if trace is not None:
        trace.inputs.append(x)
        trace.logits.append(logits)
    weights = torch.softmax(logits, dim=-1)
    if len(experts) > shape.top_k:
        kept = weights.topk(shape.top_k, dim=-1).indices
        weights = weights * torch.zeros_like(weights).scatter_(-1, kept, 1.0)
    weights = weights.to(x.dtype)
    mixed = torch.zeros_like(x)
    lengths = []
    for index, expert in enumerate(experts):
        gated = silu(linear(x, expert[f"{layer}.gate_proj"]))
        inner = gated * linear(x, expert[f"{layer}.up_proj"])
        out = linear(inner, expert[f"{layer}.down_proj"])
        mixed = mixed + out * weights[..., index, None]
        if trace is not None:
            lengths.append(out.detach().norm(dim=-1))
    if trace is not None:
        trace.loudness.append(torch.stack(lengths, dim=-1))
    return mixed


def _attention(
    shape: Shape,
    shared: Tensors,
    prefix: str,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    visible: torch.Tensor | None,
) -> torch.Tensor:
    B, T, H = x.shape

    def split(name: str, norm: str = "") -> torch.Tensor:
        projected = linear(x, shared[f"{prefix}.{name}.weight"])
        if norm:  # over the full width, before the heads part
            projected = _norm(shape, projected, shared[f"{prefix}.{norm}.weight"])
        return projected.view(B, T, shape.heads, shape.head_dim).transpose(1, 2)

    q, k = (
        _rotate(split("q_proj", "q_norm"), cos, sin),
        _rotate(split("k_proj", "k_norm"), cos, sin),
    )
    mixed = scaled_dot_product_attention(
        q, k, split("v_proj"), attn_mask=visible, is_causal=visible is None
    )
    return linear(mixed.transpose(1, 2).reshape(B, T, H), shared[f"{prefix}.o_proj.weight"])


def _norm(shape: Shape, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm in fp32, rounded once at the end, as Hugging Face's FlexOlmoRMSNorm does."""
    return (weight * rms_norm(x.float(), (x.shape[-1],), eps=shape.norm_eps)).to(x.dtype)


def _rotary(shape: Shape, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin, [T, head_dim] each."""
    steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.arange(length, dtype=torch.float32)[:, None] * shape.rope_theta**-steps
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [B, heads, T, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
