"""The best oracle is a deletion: Hugging Face's FlexOlmo with every other expert taken out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn import Parameter
from transformers import FlexOlmoForCausalLM
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoTopKRouter

from expertgate.policies.expert_set import ExpertSet

# So small a model gains nothing from a second thread, and waits for it where cores are shared.
torch.set_num_threads(1)


class _BiasedRouter(FlexOlmoTopKRouter):
    """Hugging Face's router, which has no bias, with one [E] added to its logits."""

    bias: torch.Tensor

    def forward(self, hidden_states):
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = F.linear(hidden_states, self.weight).float() + self.bias
        top, indices = torch.topk(torch.softmax(logits, dim=-1), self.top_k, dim=-1)
        return logits, top.to(hidden_states.dtype), indices


@dataclass(frozen=True)
class Forced:
    """What a model says of a given continuation, token by token.

    `best` are the tokens that it would have chosen itself at each place, `logprobs` its
    log-probabilities of the given ones. A continuation is greedy if it equals `best`.
    """

    best: list[int]
    logprobs: list[float]


class RowDeletion:
    """A checkpoint from which router rows and FFNs are deleted, another set at each call."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = FlexOlmoForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.top_k = self.model.config.num_experts_per_tok
        tensors = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
        self.whole = []
        for index, layer in enumerate(self.model.model.layers):
            bias = tensors.get(f"model.layers.{index}.mlp.gate.expert_bias")
            if bias is not None:
                layer.mlp.gate.__class__ = _BiasedRouter
                bias = torch.cat([torch.zeros(1), bias.float().clamp(max=0)])
            ffn = layer.mlp.experts
            self.whole.append((layer.mlp.gate.weight, ffn.gate_up_proj, ffn.down_proj, bias))

    @torch.inference_mode()
    def force(self, experts: ExpertSet, prompt: Sequence[int], tokens: Sequence[int]) -> Forced:
        """The opinion on `prompt` + `tokens` of the model that has `experts` and no others."""
        self._keep(list(experts))
        whole = torch.tensor([[*prompt, *tokens]])
        logits = self.model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        given = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return Forced(logits.argmax(-1).tolist(), given.tolist())

    @torch.inference_mode()
    def route(
        self, experts: ExpertSet, tokens: Sequence[int], start: int = 0
    ) -> tuple[list[int], list[float]]:
        """How often each expert is chosen over all layers, and with what weight in all.

        Of the tokens from `start` on. By the index that an expert has in the whole model, so those
        that are deleted have 0.
        """
        kept = list(experts)
        self._keep(kept)
        slots, weights = [0] * len(self.whole[0][0]), [0.0] * len(self.whole[0][0])
        chosen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def note(module: object, args: object, routed: tuple[torch.Tensor, ...]) -> None:
            # By the logits, because weights that underflow to 0 have no order of their own.
            best = routed[0][start:].float().topk(min(self.top_k, len(kept)), dim=-1).indices
            every = torch.softmax(routed[0][start:].double(), dim=-1)
            chosen.append((every.gather(1, best), best))

        hooks = [layer.mlp.gate.register_forward_hook(note) for layer in self.model.model.layers]
        self.model(torch.tensor([list(tokens)]), use_cache=False)
        for hook in hooks:
            hook.remove()
        for weight, index in chosen:
            for place, expert in enumerate(kept):
                slots[expert] += int((index == place).sum())
                weights[expert] += float(weight[index == place].sum())
        return slots, weights

    def _keep(self, kept: list[int]) -> None:
        for layer, (rows, gate_up, down, bias) in zip(
            self.model.model.layers, self.whole, strict=True
        ):
            router, ffn = layer.mlp.gate, layer.mlp.experts
            router.weight = Parameter(rows[kept], requires_grad=False)
            router.num_experts, router.top_k = len(kept), min(self.top_k, len(kept))
            ffn.gate_up_proj = Parameter(gate_up[kept], requires_grad=False)
            ffn.down_proj = Parameter(down[kept], requires_grad=False)
            ffn.num_experts = len(kept)
            if bias is not None:
                router.bias = bias[kept]
