"""What the entry point changes in every process of vLLM."""

import os
import signal
import subprocess
import sys

import pytest
from vllm.distributed import utils
from vllm.distributed.device_communicators import shm_broadcast

from expertgate.model.plugin import register


def test_on_cpus_nothing_waits_by_yielding(monkeypatch):
    monkeypatch.setattr(utils, "USE_SCHED_YIELD", True)
    register()
    monkeypatch.setattr(os, "sched_yield", lambda: pytest.fail("yielded"))
    shm_broadcast.sched_yield()


STARTS_ANOTHER = """
import multiprocessing, os, time
from expertgate.model.plugin import register

def run():
    register()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=run).start()
    time.sleep(600)
"""


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    """As where the kernel kills the server: its engine would hold the memory for ever."""
    script = tmp_path / "script.py"
    script.write_text(STARTS_ANOTHER)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    try:
        parent.communicate(timeout=60)  # until nobody has the pipe any more
    except subprocess.TimeoutExpired:
        os.kill(child, signal.SIGKILL)
        raise


ENDS_BY_ITSELF = """
import multiprocessing
from expertgate.model.plugin import register

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=register, daemon=True)
    child.start()
    child.join(120)
    exit(child.exitcode != 0)
"""


def test_a_process_that_is_done_waits_for_nobody(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ENDS_BY_ITSELF)
    assert subprocess.run([sys.executable, script]).returncode == 0
