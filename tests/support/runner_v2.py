"""vLLM's GPU runner, Model Runner V2, on a CPU: Triton's interpreter takes the GPU's place.

vLLM's own CPU worker has this very runner where Triton compiles for CPUs, and replaces streams,
events and pinned memory for it. No registry has such a Triton, so the interpreter is taken for one
(`tests/conftest.py`): it runs the kernels of the runner, of the sampler and of the experts.
Attention is that of CPUs.
"""

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as unquantized
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.runner import moe_runner
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

from expertgate.kernels import dispatch
from expertgate.kernels.gpu import routing
from expertgate.model import experts
from expertgate.model.ledger import ReportsUsage
from expertgate.model.masked_experts import MaskedExperts
from expertgate.model.proof import ProvesMasks
from tests.kernels import interpreter


class Worker(ProvesMasks, ReportsUsage, CPUWorker):
    """As `gpu_worker.MaskedGPUWorker`, on the worker that needs no GPU."""

    def init_device(self):
        super().init_device()
        reset_workspace_manager()
        init_workspace_manager(self.device)  # scratch that all layers share, as on a GPU


WORKER = f"{__name__}.Worker"


class _NoCPU:
    """The platform, but for what it is called."""

    def __getattr__(self, name):
        return (lambda: False) if name == "is_cpu" else getattr(current_platform, name)


def pretend(monkeypatch):
    """From here on, kernels are chosen and steps are scheduled as on an NVIDIA GPU."""
    interpreter.mend(monkeypatch)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # another process would know nothing
    monkeypatch.setattr(dispatch, "routing", routing)
    for module in (experts, modular_kernel, moe_runner):
        monkeypatch.setattr(module, "current_platform", _NoCPU())
    for kernel in (MaskedExperts, TritonExperts):
        monkeypatch.setattr(kernel, "_supports_current_device", staticmethod(lambda: True))
    monkeypatch.setattr(
        unquantized,
        "select_unquantized_moe_backend",
        lambda **_: (UnquantizedMoeBackend.FLASHINFER_CUTLASS, object),  # as on Blackwell
    )
    monkeypatch.setattr(ops, "moe_align_block_size", _align)
    monkeypatch.setattr(ops, "moe_sum", lambda x, out, *_: torch.sum(x, dim=1, out=out))
    _schedule_ahead(monkeypatch)


def _schedule_ahead(monkeypatch):
    """A step is scheduled before the last one's tokens are known, which CPUs have switched off."""
    check = CpuPlatform.check_and_update_config.__func__

    def keep(cls, config):
        wanted = config.scheduler_config.async_scheduling
        check(cls, config)
        config.scheduler_config.async_scheduling = wanted

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep))


def _align(experts_of, num_experts, block, pairs, owners, num_pairs, *_):
    """vLLM's own is in CUDA: pairs by expert, and each expert's filled up to whole blocks."""
    flat = experts_of.flatten()
    assert ((flat >= 0) & (flat < num_experts)).all(), "an empty slot, of which it knows nothing"
    filled, named = [], []
    for expert in range(num_experts):
        [mine] = torch.nonzero(flat == expert, as_tuple=True)
        blocks = -(-len(mine) // block)
        filled += [mine, mine.new_full((blocks * block - len(mine),), len(flat))]
        named += [expert] * blocks
    whole = torch.cat(filled)
    pairs.fill_(len(flat))[: len(whole)] = whole
    owners.fill_(-1)[: len(named)] = torch.tensor(named)
    num_pairs.fill_(len(whole))
