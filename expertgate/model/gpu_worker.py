"""vLLM's GPU worker, able to say what it runs and what it did. Given to vLLM as `worker_cls`."""

from vllm.v1.worker.gpu_worker import Worker

from expertgate.model.ledger import ReportsUsage
from expertgate.model.proof import ProvesMasks


class MaskedGPUWorker(ProvesMasks, ReportsUsage, Worker):
    """Model Runner V2 asks the model for its state, so nothing needs to be replaced here."""
