"""vLLM's router and experts, made to skip what a token may not consult.

Dimensions: T tokens, E experts, K = top_k slots, H hidden.
"""

import functools
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod
from vllm.model_executor.layers.quantization.online.fp8 import Fp8PerBlockOnlineMoEMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8Dynamic128Sym,
    kFp8Static128BlockSym,
)
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from expertgate.kernels import NO_EXPERT, RoutingPlan, route
from expertgate.kernels.cpu import Kernel, run_packed, run_used
from expertgate.model.masked_experts import MaskedExperts
from expertgate.model.masks import TokenMasks
from expertgate.model.moe_kernel import wanted
from expertgate.model.quantised import BLOCK


class MaskedRouter(BaseRouter):
    """Chooses among the experts whose logit is not -inf; the logits arrive masked."""

    def __init__(self, *, top_k: int, num_experts: int, renormalize: bool) -> None:
        super().__init__(top_k=top_k, global_num_experts=num_experts)
        self.renormalize = renormalize
        self.empty = NO_EXPERT
        """What a slot names that has no expert: as the experts' kernels want it."""

    @property
    def routing_method_type(self) -> RoutingMethodType:
        # Anything else would let vLLM pick a kernel that routes by itself, from the raw logits.
        return RoutingMethodType.Custom

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,  # noqa: ARG002
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan = route(
            router_logits,
            None,
            top_k=self.top_k,
            renormalize=self.renormalize,
            empty=self.empty,
        )
        return plan.weights, plan.experts.to(indices_type or torch.int32)


class MaskedRoutedExperts(RoutedExperts):
    """Expert weights that are read for the slots that name an expert, and for no others."""

    masks: TokenMasks | None = None
    """Of the model, which know how many rows of a step are tokens."""
    empty = NO_EXPERT
    """What a slot without an expert names, as `MaskedRouter.empty` has it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Where vLLM finds each expert; the last, behind them, it takes for another rank's.
        places = torch.arange(self.local_num_experts + 1, dtype=torch.int32)
        places[-1] = NO_EXPERT
        self.register_buffer("_places", places, persistent=False)

    def _get_quant_method(self, *args: Any) -> FusedMoEMethodBase:
        """A hook of vLLM's: what holds the weights, and whose kernels read them."""
        method = super()._get_quant_method(*args)
        ours = wanted(get_current_vllm_config().additional_config) == "expertgate"
        # Of vLLM's kernels those in Triton, which are told what slots are empty. On Blackwell it
        # prefers FlashInfer's, which sum what was never written for a slot that they skip.
        kernel = MaskedExperts if ours else TritonExperts
        if isinstance(method, UnquantizedFusedMoEMethod):
            if not ours and method.unquantized_backend == UnquantizedMoeBackend.CPU:
                return method
            # The weights stay in the order of vLLM's Triton kernels, which is the checkpoint's.
            method.unquantized_backend = UnquantizedMoeBackend.TRITON
            scheme = None, None
        elif isinstance(method, Fp8PerBlockOnlineMoEMethod) or _is_vetted_on_disk(method):
            # Each row has scales of its own. With one for all rows, neighbours would show, and in
            # the second product whatever lies in the rows of empty slots.
            method.fp8_backend = Fp8MoeBackend.TRITON
            scheme = kFp8Static128BlockSym, kFp8Dynamic128Sym
        else:
            raise ValueError(f"{type(method).__name__}: masks aren't shown to hold in its kernels")
        supported, reason = kernel.is_supported_config(
            kernel, method.moe, *scheme, MaskedExperts.activation_format()
        )
        if not supported:
            raise ValueError(f"{'expertgate' if ours else 'vLLM'}'s own MoE kernels: {reason}")
        method.experts_cls = kernel
        if not ours:
            self.empty = self.local_num_experts
        return method

    @property
    def kernel(self) -> FusedMoEExperts:
        """What does the work, once weights are loaded."""
        return self.quant_method.moe_kernel.fused_experts

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,  # noqa: ARG002
    ) -> Any:
        """`x` [T, H]; `topk_weights` [T, K] float32; `topk_ids` [T, K], `empty` = no work."""
        assert shared_experts is None, "FlexOlmo has no shared experts"
        if isinstance(self.kernel, MaskedExperts):
            return super().forward_modular(x, topk_weights, topk_ids)
        if current_platform.is_cpu():
            return torch.ops.vllm.expertgate_used_slots(x, topk_weights, topk_ids, self.layer_name)
        # An empty slot costs what other ranks' slots cost: nothing. A token without any expert
        # (padding never is one: it has `public`) gives zeros.
        return self.quant_method.moe_kernel.apply(
            hidden_states=x,
            w1=self.w13_weight,
            w2=self.w2_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=self.activation,
            global_num_experts=len(self._places),
            expert_map=self._places,
            apply_router_weight_on_input=False,
        )

    @functools.cached_property
    def plain_on_cpu(self) -> str | None:
        """The instructions of vLLM's kernel for CPUs, where it has all experts here, unquantised.

        None elsewhere. Asked once weights are loaded.
        """
        kernel = self.kernel
        plain = isinstance(kernel, CPUUnquantizedExperts) and not kernel._use_zentorch
        return kernel.isa if plain and self.expert_map is None else None

    def run_used(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """By vLLM's kernels, which are given no empty slot; shapes as in `forward_modular`.

        Padding has no work, and zeros.
        """
        run: Kernel = super().forward_modular
        if self.plain_on_cpu is not None:
            # Without the steps around the kernel, which prepare for other ranks' tokens and for
            # quantised inputs. A compiler sees through them in stock models, but not in an opaque
            # operation, where they took as long as the kernel.
            run = partial(run_packed, self.w13_weight, self.w2_weight, self.plain_on_cpu)
        count, rows = self.masks.count if self.masks else 0, x.shape[0]
        if not 0 < count < rows:  # at rest, as with vLLM's own worker, nobody knows
            return run_used(x, RoutingPlan(topk_weights, topk_ids), run)
        plan = RoutingPlan(topk_weights[:count], topk_ids[:count])
        return nn.functional.pad(run_used(x[:count], plan, run), (0, 0, 0, rows - count))


def _is_vetted_on_disk(method: FusedMoEMethodBase) -> bool:
    """Whether it reads FP8 from the checkpoint, in blocks that it doesn't cut for a rank's sake."""
    return type(method) is Fp8MoEMethod and method.moe_block_shape == [BLOCK, BLOCK]


def _used_slots(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> torch.Tensor:
    layer = get_forward_context().no_compile_layers[layer_name]
    return layer.routed_experts.run_used(x, topk_weights, topk_ids)


def _used_slots_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,  # noqa: ARG001
    topk_ids: torch.Tensor,  # noqa: ARG001
    layer_name: str,  # noqa: ARG001
) -> torch.Tensor:
    return torch.empty_like(x)


# Opaque to the compiler, because how many slots are used is known only when it runs.
direct_register_custom_op(
    op_name="expertgate_used_slots", op_func=_used_slots, fake_impl=_used_slots_fake
)
