"""FlexOlmo (arXiv 2507.07024) as a native vLLM model whose experts are chosen per request.

Attention is OLMoE's with FlexOlmo's norms; a layer normalises *after* attention and after its
experts, and has no input norm. Experts, weight loading, parallelism and kernels are vLLM's; ours is
the mask between the router and the experts.

Dimensions: T tokens, E experts, H hidden.
"""

import functools
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.olmoe import OlmoeAttention
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import direct_register_custom_op

from expertgate.kernels import RoutingPlan, mask_logits
from expertgate.kernels.routing import exclude, expert_bits, select
from expertgate.model.experts import MaskedRoutedExperts, MaskedRouter
from expertgate.model.ledger import Ledger
from expertgate.model.masks import TokenMasks

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_states.interface import ModelState

BIAS_SUFFIX = ".mlp.gate.expert_bias"
"""Optional in a checkpoint: [E-1], the negative router bias of experts 1.. of one layer."""


class FlexOlmoAttention(OlmoeAttention):
    """OLMoE's attention with q/k norms over the full width at the checkpoint's own epsilon."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        eps = vllm_config.model_config.hf_config.rms_norm_eps
        self.q_norm = RMSNorm(self.total_num_heads * self.head_dim, eps=eps)
        self.k_norm = RMSNorm(self.total_num_kv_heads * self.head_dim, eps=eps)


class FlexOlmoMoE(nn.Module):
    """One layer's router and experts; a token reaches the experts of its own mask only."""

    def __init__(self, *, vllm_config: VllmConfig, masks: TokenMasks, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.masks = masks
        self.ledger_part: torch.Tensor  # [T, E] of its logits; set once all layers are there
        self.prefix = prefix
        self.router_bias: torch.Tensor
        self.expert_bits: torch.Tensor
        self.top_k = config.num_experts_per_tok
        self.renormalize = config.norm_topk_prob
        self.tensor_parallel = get_tensor_model_parallel_world_size() > 1
        # Opaque operations find this module by its name, so that no compiler bakes in what stood
        # there when it traced.
        static = vllm_config.compilation_config.static_forward_context
        if prefix in static:
            raise ValueError(f"two layers are called {prefix}")
        static[prefix] = self
        self.gate = GateLinear(config.hidden_size, config.num_experts, prefix=f"{prefix}.gate")
        # Of experts 1.., none above 0. Zeros are added where a checkpoint brings none: what was
        # compiled for one such checkpoint is taken from the cache for the next.
        bias = torch.zeros(config.num_experts - 1, dtype=torch.float32)
        self.register_buffer("router_bias", bias, persistent=False)
        self.register_buffer("expert_bits", expert_bits(config.num_experts), persistent=False)
        router = MaskedRouter(
            top_k=config.num_experts_per_tok,
            num_experts=config.num_experts,
            renormalize=config.norm_topk_prob,
        )
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=config.norm_topk_prob,
            quant_config=vllm_config.quant_config,
            router=router,
            routed_experts_cls=MaskedRoutedExperts,
            prefix=f"{prefix}.experts",
        )
        router.empty = self.experts.routed_experts.empty
        self.experts.routed_experts.masks = masks

    def masked_logits(self, router_logits: torch.Tensor) -> torch.Tensor:
        """`router_logits` [T, E] → float32, -inf where a token may not consult the expert.

        They are left in the ledger too: usage is counted once the step has run.
        """
        T = len(router_logits)
        return mask_logits(
            router_logits, self.masks.words[:T], self.router_bias, copy=self.ledger_part[:T]
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T, H]; the layer looks at the masks by itself."""
        router_logits, _ = self.gate(hidden_states)
        masked = torch.ops.vllm.expertgate_mask_logits(router_logits, self.prefix)
        # The row carries its own mask from here on, wherever the experts may gather it to.
        return self.experts(hidden_states=hidden_states, router_logits=masked)

    def forward_plain(
        self, hidden_states: torch.Tensor, allowed: torch.Tensor
    ) -> tuple[torch.Tensor, RoutingPlan]:
        """On CPUs: `hidden_states` and the masks [T] → [T, H], and who was consulted.

        Routed among what the compiler sees, and without the steps that vLLM takes for other
        devices: of a small model they are a good part of the time.
        """
        router_logits, _ = self.gate(hidden_states)
        masked = exclude(router_logits, allowed, self.expert_bits, self.router_bias)
        plan = select(masked, top_k=self.top_k, renormalize=self.renormalize)
        out = torch.ops.vllm.expertgate_used_slots(
            hidden_states, *plan, self.experts.routed_experts.layer_name
        )
        return tensor_model_parallel_all_reduce(out) if self.tensor_parallel else out, plan


def _mask_logits(router_logits: torch.Tensor, layer_name: str) -> torch.Tensor:
    layer = get_forward_context().no_compile_layers[layer_name]
    return layer.masked_logits(router_logits)


def _mask_logits_fake(router_logits: torch.Tensor, layer_name: str) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(router_logits, dtype=torch.float32)


direct_register_custom_op(
    op_name="expertgate_mask_logits", op_func=_mask_logits, fake_impl=_mask_logits_fake
)


class FlexOlmoDecoderLayer(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, masks: TokenMasks, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = FlexOlmoAttention(vllm_config=vllm_config, prefix=f"{prefix}.self_attn")
        self.mlp = FlexOlmoMoE(vllm_config=vllm_config, masks=masks, prefix=f"{prefix}.mlp")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        allowed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RoutingPlan | None]:
        """What the layer gives, and with `allowed` whom it consulted."""
        attended = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        plan = None
        if allowed is None:
            answers = self.mlp(hidden_states)
        else:
            answers, plan = self.mlp.forward_plain(hidden_states, allowed)
        return hidden_states + self.post_feedforward_layernorm(answers), plan


@support_torch_compile
class FlexOlmoModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, masks: TokenMasks, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: FlexOlmoDecoderLayer(
                vllm_config=vllm_config, masks=masks, prefix=prefix
            ),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
        allowed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | IntermediateTensors, RoutingPlan | None]:
        """What this rank gives, and with `allowed` whom its layers consulted, [layers, T, K].

        `allowed` [T] int64, the masks, is an input as the tokens are, and so nothing that a
        compiler could keep. None where the layers are to look at the masks by themselves.
        """
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
        elif inputs_embeds is not None:
            hidden_states = inputs_embeds
        else:
            assert input_ids is not None
            hidden_states = self.embed_input_ids(input_ids)
        plans = []
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, plan = layer(positions, hidden_states, allowed)
            if plan is not None:
                plans.append(plan)
        routed = RoutingPlan(*map(torch.stack, zip(*plans, strict=True))) if plans else None
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states}), routed
        return self.norm(hidden_states), routed


class FlexOlmoForCausalLM(nn.Module, SupportsPP):
    """Loads stock Hugging Face FlexOlmo checkpoints unchanged.

    It declares no LoRA support on purpose: an adapter would be one more thing that speaks.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
        }
    )
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.masks = TokenMasks(
            vllm_config.scheduler_config.max_num_batched_tokens,
            torch.get_default_device(),
        )
        self.model = FlexOlmoModel(
            vllm_config=vllm_config, masks=self.masks, prefix=maybe_prefix(prefix, "model")
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        layers = list(self.moe_layers)
        self.ledger = Ledger(
            num_layers=len(layers),
            max_tokens=len(self.masks.words),
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            renormalize=config.norm_topk_prob,
            device=self.masks.words.device,
        )
        for layer, part in zip(layers, self.ledger.logits, strict=True):
            layer.ledger_part = part
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    @staticmethod
    def get_model_state_cls() -> "type[ModelState]":
        """Asked for by Model Runner V2; imported here because it needs a working Triton."""
        from expertgate.model.model_state import MaskedModelState

        return MaskedModelState

    @property
    def moe_layers(self) -> Iterator[FlexOlmoMoE]:
        """The MoE layers that this pipeline rank holds."""
        return (module for module in self.modules() if isinstance(module, FlexOlmoMoE))

    @functools.cached_property
    def plain_on_cpu(self) -> bool:
        """Whether all layers' experts are; asked once they are loaded."""
        return all(layer.experts.routed_experts.plain_on_cpu for layer in self.moe_layers)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        allowed = self.masks.words[: positions.shape[0]] if self.plain_on_cpu else None
        given, routed = self.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, allowed
        )
        self.ledger.routed = routed
        return given

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            self._without_biases(weights), mapper=self.hf_to_vllm_mapper
        )
        return loaded

    def _without_biases(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Keeps the router biases for our own layers and passes on what vLLM's loader knows."""
        layers: dict[str, Any] = {layer.prefix: layer for layer in self.moe_layers}
        for name, tensor in weights:
            if not name.endswith(BIAS_SUFFIX):
                yield name, tensor
                continue
            layer = layers.get(name.removesuffix(".gate.expert_bias"))
            if layer is not None:  # else another pipeline rank's
                layer.router_bias.copy_(_checked_bias(name, tensor, self.config.num_experts))


def _checked_bias(name: str, tensor: torch.Tensor, num_experts: int) -> torch.Tensor:
    if tensor.shape != (num_experts - 1,):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; a router bias has one value for each of "
            f"experts 1..{num_experts - 1}, so [{num_experts - 1}]"
        )
    return tensor.float().clamp(max=0)
