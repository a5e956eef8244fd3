"""Set before anything imports vLLM, in this process and in those that it starts."""

import os

from hypothesis import settings

os.environ.setdefault("VLLM_PLUGINS", "expertgate")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each of several workers has a core: vLLM would give all their engines the same.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))

# The first example that uses torch takes most of a second, and slow machines are no failure.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")

# vLLM looks for a Triton that it can use when it is imported. Where kernels are interpreted, it is
# to find one that compiles for CPUs: the only way to have Model Runner V2 without a GPU.
if os.environ.get("TRITON_INTERPRET") == "1":
    from types import SimpleNamespace

    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: True))
