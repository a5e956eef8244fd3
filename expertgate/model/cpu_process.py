"""On CPUs, a worker that is the only one lives in the engine's own process.

vLLM gives it a process of its own, because OpenMP reads its variables when a process starts. Engine
and worker then wait for each other twice a step, which costs a small model a tenth of its speed.
The variables can as well be those of the engine's process: that is what this does.

They bind the process's first thread to a core, and so all that it starts: also the threads which
take requests and send outputs, and then wait for each step's end. Those are set free again.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor

EXECUTOR = f"{__name__}.SharedProcessExecutor"
"""For vLLM's `distributed_executor_backend`: `uni` would mean `mp` on CPUs."""


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


class SharedProcessExecutor(UniProcExecutor):
    """vLLM's own for one worker, which knows of no OpenMP in its process."""

    _num_threads = 0

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        # A new thread is bound as the one that started it is.
        if threading.active_count() != self._num_threads:
            self._num_threads = threading.active_count()
            _free_threads()
        return super().execute_model(*args, **kwargs)


def _free_threads() -> None:
    """Lets Python's threads but the first, and those of ZeroMQ, run wherever the parent may."""
    if not hasattr(os, "sched_setaffinity"):
        return  # where there is none, nothing was bound
    cpus = os.sched_getaffinity(os.getppid())
    python = {thread.native_id for thread in threading.enumerate()}
    for task in Path("/proc/self/task").iterdir():
        number = int(task.name)
        with suppress(OSError):  # it has ended
            named = (task / "comm").read_text().startswith("ZMQbg/")
            if named or (number in python and number != os.getpid()):
                os.sched_setaffinity(number, cpus)
