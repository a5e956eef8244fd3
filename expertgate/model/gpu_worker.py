"""vLLM's GPU worker, able to prove what it runs. Given to vLLM as `worker_cls`."""

from vllm.v1.worker.gpu_worker import Worker

from expertgate.model.proof import ProvesMasks


class MaskedGPUWorker(ProvesMasks, Worker):
    """Model Runner V2 asks the model for its state, so nothing needs to be replaced here."""
