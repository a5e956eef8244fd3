"""On CPUs, a worker that is the only one lives in the engine's own process.

vLLM gives it a process of its own, because OpenMP reads its variables when a process starts. Engine
and worker then wait for each other twice a step, which costs a small model a tenth of its speed.
The variables can as well be those of the engine's process: that is what this does.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm.platforms import current_platform
from vllm.utils.ompmultiprocessing import OMPProcessManager

EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""For vLLM's `distributed_executor_backend`. On CPUs `uni` would mean `mp`; the name of the class
does not."""


def is_alone(arguments: Mapping[str, object]) -> bool:
    """Whether vLLM's `arguments` make one worker, and ask for no process of its own."""
    ranks = ("tensor_parallel_size", "pipeline_parallel_size")
    return all(arguments.get(name, 1) == 1 for name in ranks) and arguments.get(
        "distributed_executor_backend"
    ) in (None, "uni")


@contextmanager
def openmp(config: Any) -> Iterator[None]:
    """The environment in which to start the engine that vLLM's `config` is of.

    Where the worker shares the engine's process: how many threads OpenMP has and on which cores, as
    vLLM says it to a worker's process. Elsewhere nothing.
    """
    shared = config.parallel_config.distributed_executor_backend == EXECUTOR
    if not (shared and current_platform.is_cpu()):
        yield
        return
    with OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0):
        yield
