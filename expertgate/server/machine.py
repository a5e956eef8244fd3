"""What the machine must have before an engine starts; vLLM misses it later, and in more words."""

import ctypes
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import vllm
from vllm.config import CacheConfig
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

from expertgate.model.checkpoint import Checkpoint
from expertgate.server.refusals import SettingError


def check_kernels() -> None:
    """VLLM warns of kernels for CPUs that it can't load, and ends where it misses them first.

    Raises SettingError.
    """
    current_platform.import_kernels()
    if hasattr(torch.ops._C, "init_cpu_memory_env"):
        return
    for library in sorted(Path(vllm.__file__).parent.glob("_C*.so")):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            raise SettingError(
                f"vLLM's kernels for CPUs can't be loaded: {error}: install what is missing (on "
                "Debian, libnuma1 has libnuma.so.1)"
            ) from None
    raise SettingError("vLLM's kernels for CPUs can't be loaded: `make clean install` may mend it")


def check_memory(model: Checkpoint, available: int) -> None:
    """The weights alone must fit, or the kernel ends a process without a word of why.

    Raises SettingError.
    """
    weights = sum(file.stat().st_size for file in model.files())
    if weights > available:
        raise SettingError(
            f"the weights in {model.folder} are {weights / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB of memory are free: end what takes it, or serve on a larger "
            "machine"
        )


def check_free(cache: CacheConfig) -> None:
    """What vLLM takes of the memory must be free, or its worker fails, with a traceback."""
    nodes = get_visible_memory_node()
    if cache.kv_cache_memory_bytes is not None or len(nodes) > 1:  # of several, which isn't known
        return
    memory, part = get_memory_node_info(nodes[0]), cache.gpu_memory_utilization
    if memory.total_memory * part > memory.available_memory:
        raise SettingError(
            f"the engine would take {part} of {memory.total_memory / 1e9:.1f} GB of memory, and "
            f"{memory.available_memory / 1e9:.1f} GB are free: say by kv_cache_memory_bytes how "
            "much its cache may have, or by gpu_memory_utilization a smaller part, under `engine:`"
        )


def check_cpp_compiler(environ: Mapping[str, str], headers: Path) -> None:
    """VLLM compiles for CPUs when it is first needed, even some of what `enforce_eager` leaves.

    `headers`: the folder of Python's own.
    """
    if environ.get("TORCH_COMPILE_DISABLE") == "1":
        return
    or_not = (
        "or have nothing compiled by TORCH_COMPILE_DISABLE=1 and `enforce_eager: true` under "
        "`engine:`"
    )
    wanted = environ.get("CXX", "g++")
    if shutil.which(wanted) is None:
        raise SettingError(
            f"no C++ compiler: there is no {wanted!r}, and vLLM compiles for CPUs: install g++, "
            f"name another by CXX, {or_not}"
        )
    if not (headers / "Python.h").exists():
        raise SettingError(
            f"no headers of Python: there is no {headers / 'Python.h'}, and vLLM compiles for "
            f"CPUs: install them (on Debian, python3-dev), {or_not}"
        )


def check_c_compiler(environ: Mapping[str, str], headers: Path) -> None:
    """Triton, on GPUs, compiles its part of the driver, and asks when the first kernel runs.

    `headers`: the folder of Python's own.
    """
    wanted = [environ["CC"]] if "CC" in environ else ["gcc", "clang"]
    if not any(map(shutil.which, wanted)):
        raise SettingError(
            f"no C compiler: there is no {' or '.join(map(repr, wanted))}, and Triton compiles for "
            "GPUs: install gcc, or name another by CC"
        )
    if not (headers / "Python.h").exists():
        raise SettingError(
            f"no headers of Python: there is no {headers / 'Python.h'}, and Triton compiles for "
            "GPUs: install them (on Debian, python3-dev)"
        )
