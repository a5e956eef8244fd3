"""The Triton kernels as one of vLLM's modular experts, so that loading and parallelism stay vLLM's.

Dimensions: T tokens, E experts, K = top_k slots, H hidden, I inner (of this rank).
"""

from typing import Any

import torch
import vllm.envs
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.platforms import current_platform

from expertgate.kernels.checks import DTYPES, MAX_EXPERTS, MAX_TOP_K, MULTIPLE
from expertgate.kernels.routing import RoutingPlan


class MaskedExperts(mk.FusedMoEExpertsModular):
    """Does the work of the slots that name an expert; NO_EXPERT is none."""

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def is_supported_config(
        cls: Any,  # vLLM passes the class itself
        moe_config: FusedMoEConfig,
        weight_key: Any,
        activation_key: Any,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        supported, reason = mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        if not supported:
            return False, reason
        inner = moe_config.intermediate_size_per_partition
        for holds, what in (
            (moe_config.in_dtype in DTYPES, f"dtype {moe_config.in_dtype}"),
            (not moe_config.has_bias, "experts with biases"),
            (moe_config.num_experts <= MAX_EXPERTS, f"{moe_config.num_experts} experts"),
            (moe_config.experts_per_token <= MAX_TOP_K, f"top_k {moe_config.experts_per_token}"),
            (inner % MULTIPLE == 0, f"an inner size of {inner} on each rank"),
        ):
            if not holds:
                return False, f"kernel does not support {what}"
        return True, None

    @staticmethod
    def _supports_current_device() -> bool:
        # Ampere is the first that multiplies bfloat16.
        return current_platform.is_cuda() and current_platform.has_device_capability((8, 0))

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        # Tensor parallelism cuts I, and the ranks' sums are added by vLLM.
        return not moe_parallel_config.use_ep and moe_parallel_config.dp_size == 1

    @staticmethod
    def _supports_shape(hidden_dim: int) -> bool:
        return hidden_dim % MULTIPLE == 0

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True

    def workspace_shapes(
        self,
        M: int,
        N: int,  # noqa: ARG002
        K: int,
        *_: Any,
        **__: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Only the result's, M tokens by K hidden: the kernels allocate what lies between."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> None:
        """`output` and `hidden_states` [T, H]; `w1` [E, 2I, H]; `w2` [E, H, I]; the rest [T, K]."""
        from expertgate.kernels.gpu.layer import experts  # imports Triton, which CPUs do without

        experts(
            hidden_states,
            RoutingPlan(topk_weights, topk_ids),
            w1,
            w2,
            deterministic=vllm.envs.VLLM_BATCH_INVARIANT,
            out=output,
        )
