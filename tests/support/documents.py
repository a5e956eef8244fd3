"""The commands of a document, done as they stand."""

import os
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In this folder, by a shell that stops at the first that fails."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment["PATH"] = f"{sysconfig.get_path('scripts')}:{environment['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
