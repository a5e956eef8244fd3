"""Runs the Triton kernels where there is no GPU: their tests, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run compiled here")
@pytest.mark.parametrize(
    "tests",
    [["kernels/test_triton.py"], ["model/test_moe_kernel.py", "-k", "equals_the_twin"]],
)
def test_in_tritons_interpreter(tests):
    # A process of its own: Triton must know before it is imported, and others import it compiled.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(TESTS / tests[0]), *tests[1:]],
        env=dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
