"""vLLM's GPU runner, Model Runner V2, on a CPU: Triton's interpreter takes the GPU's place.

vLLM's own CPU worker has this very runner where Triton compiles for CPUs, and replaces streams,
events and pinned memory for it. No registry has such a Triton, so the interpreter is taken for one
(`tests/conftest.py`): it runs the kernels of the runner, of the sampler and of the experts.
Attention is that of CPUs.
"""

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

from expertgate.kernels import dispatch
from expertgate.kernels.gpu import routing
from expertgate.model.ledger import ReportsUsage
from expertgate.model.proof import ProvesMasks
from tests.kernels import interpreter
from tests.support import vllms_moe


class Worker(ProvesMasks, ReportsUsage, CPUWorker):
    """As `gpu_worker.MaskedGPUWorker`, on the worker that needs no GPU."""

    def init_device(self):
        super().init_device()
        reset_workspace_manager()
        init_workspace_manager(self.device)  # scratch that all layers share, as on a GPU


WORKER = f"{__name__}.Worker"


def pretend(monkeypatch):
    """From here on, kernels are chosen and steps are scheduled as on an NVIDIA GPU."""
    interpreter.mend(monkeypatch)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # another process would know nothing
    monkeypatch.setattr(dispatch, "routing", routing)
    vllms_moe.a_gpu(monkeypatch)
    vllms_moe.runs(monkeypatch)
    _schedule_ahead(monkeypatch)


def _schedule_ahead(monkeypatch):
    """A step is scheduled before the last one's tokens are known, which CPUs have switched off."""
    check = CpuPlatform.check_and_update_config.__func__

    def keep(cls, config):
        wanted = config.scheduler_config.async_scheduling
        check(cls, config)
        config.scheduler_config.async_scheduling = wanted

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep))
