"""The process that the server runs in: its limits, and the environment that vLLM reads.

vLLM does so when it is imported, so this comes before any such import.
"""

import logging
import os
import resource

from expertgate.server.refusals import OUR_PLUGIN, refuse_process


def settle() -> None:
    """Raises SettingError where the process can't be made safe to run vLLM in."""
    refuse_process(os.environ)
    os.environ.update(
        # Without an allow-list vLLM loads whatever is installed, into every process.
        VLLM_PLUGINS=OUR_PLUGIN,
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        VLLM_SERVER_DEV_MODE="0",
        # A fork of a process that has threads may hang.
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # vLLM speaks before it reads that level.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


def allow_files() -> None:
    """As many open files as the system allows, of which each connection is one.

    A crowd would else leave none for policies and suspensions to be read. vLLM has such a function
    as well, which leaves the limit as it is where fewer than 65,535 are allowed.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
