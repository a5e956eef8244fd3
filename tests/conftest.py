"""Set before anything imports vLLM, in this process and in those that it starts."""

import os

from hypothesis import settings

os.environ.setdefault("VLLM_PLUGINS", "expertgate")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Of several engines at a time vLLM would bind each to the same core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The first example that uses torch takes most of a second, and slow machines are no failure.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")
