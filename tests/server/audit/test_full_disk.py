"""A disk that is really full: a small tmpfs, in a mount namespace of its own."""

import os
import subprocess
import sys

import pytest

from tests.server.audit.logs import check, records

ON_SMALL_DISK = """
set -eu
mount -t tmpfs -o size=200k tmpfs "$1"
"$2" -m tests.server.audit.filled "$1"
cp -r "$1" "$3"
"""


def may_mount():
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_mount(), reason="needs unprivileged mount namespaces")
def test_a_full_disk_refuses_and_an_emptied_one_goes_on(tmp_path):
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", ON_SMALL_DISK, "sh", small, sys.executable, kept],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, _, words = done.stdout.strip().partition(" ")
    assert words == "No space left on device"
    report = check(kept)
    assert report.faults == []
    requests = [r["request"] for r in records(kept) if r["kind"] == "request"]
    assert requests == [*(f"r{number}" for number in range(int(refused))), "after"]
    assert "gap" in {record["kind"] for record in records(kept)}
