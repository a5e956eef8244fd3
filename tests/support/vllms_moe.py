"""vLLM's layer on CPU tensors as it is on a GPU, with its Triton kernels in the interpreter.

What they call in CUDA is said in torch here, as `moe_align_block_size.py` and `_custom_ops.py` of
vLLM's describe it: a slot whose expert is mapped to -1 has no pair, and isn't added.
"""

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe import modular_kernel, utils
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as unquantized
from vllm.model_executor.layers.fused_moe.experts import triton_moe
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.runner import moe_runner
from vllm.model_executor.layers.quantization import fp8 as on_disk
from vllm.model_executor.layers.quantization.online import fp8
from vllm.platforms import current_platform

from expertgate.model import experts
from expertgate.model.masked_experts import MaskedExperts


class _NoCPU:
    """The platform, but for what it is called and can do."""

    def __getattr__(self, name):
        answers = {"is_cpu": False, "supports_fp8": True}
        return (lambda: answers[name]) if name in answers else getattr(current_platform, name)


def a_gpu(monkeypatch):
    """Kernels are chosen as on Blackwell, where vLLM prefers FlashInfer's."""
    for kernel in (MaskedExperts, TritonExperts):
        monkeypatch.setattr(kernel, "_supports_current_device", staticmethod(lambda: True))
    monkeypatch.setattr(triton_moe, "current_platform", _NoCPU())
    preferred = UnquantizedMoeBackend.FLASHINFER_CUTLASS, object
    monkeypatch.setattr(unquantized, "select_unquantized_moe_backend", lambda **_: preferred)
    preferred_fp8 = Fp8MoeBackend.FLASHINFER_CUTLASS, object
    for module in (fp8, on_disk):
        monkeypatch.setattr(module, "select_fp8_moe_backend", lambda **_: preferred_fp8)
    cast = fp8.per_block_cast_to_fp8._torchdynamo_orig_callable  # compiled for a GPU there
    monkeypatch.setattr(fp8, "per_block_cast_to_fp8", cast)


def quantise(x, group=128):
    """`x` [R, C] → the same in FP8, and its scales [R, C / group] float32: a row's own."""
    parts = x.float().unflatten(1, (-1, group))
    scales = parts.abs().amax(dim=2).clamp(min=1e-10) / torch.finfo(torch.float8_e4m3fn).max
    return (parts / scales[:, :, None]).flatten(1).to(torch.float8_e4m3fn), scales


def runs(monkeypatch):
    """And run. Returns a list that gets the number of pairs with work of each call of vLLM's."""
    worked = []

    def align(experts_of, num_experts, block, pairs, owners, num_pairs, expert_map=None, *_):
        flat = experts_of.flatten()
        assert ((flat >= 0) & (flat < num_experts)).all(), "an expert that isn't there"
        local = flat if expert_map is None else expert_map[flat]
        filled, named = [], []
        for expert in range(num_experts):
            [mine] = torch.nonzero(local == expert, as_tuple=True)
            blocks = -(-len(mine) // block)
            filled += [mine, mine.new_full((blocks * block - len(mine),), len(flat))]
            named += [expert] * blocks
        whole = torch.cat(filled)
        pairs.fill_(len(flat))[: len(whole)] = whole
        owners.fill_(-1)[: len(named)] = torch.tensor(named)
        num_pairs.fill_(len(whole))
        worked.append(int((whole < len(flat)).sum()))

    def add(x, out, experts_of=None, expert_map=None):
        if expert_map is not None:
            x = x.masked_fill(expert_map[experts_of].lt(0)[:, :, None], 0)
        torch.sum(x, dim=1, out=out)

    def activate(x, group_size, quant_dtype):
        gate, up = x.float().chunk(2, dim=1)
        assert quant_dtype == torch.float8_e4m3fn
        return quantise(torch.nn.functional.silu(gate) * up, group_size)

    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    for module in (experts, modular_kernel, moe_runner):
        monkeypatch.setattr(module, "current_platform", _NoCPU())
    monkeypatch.setattr(ops, "moe_align_block_size", align)
    monkeypatch.setattr(ops, "moe_sum", add)
    monkeypatch.setattr(ops, "silu_and_mul_per_block_quant", activate)
    monkeypatch.setattr(utils, "per_token_group_quant_fp8", quantise)
    return worked
