"""The locks: whole, and each file by its hash."""

import importlib.util
import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
spec = importlib.util.spec_from_file_location("lock", REQUIREMENTS / "lock.py")
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)

PIN = re.compile(r"([\w.-]+)==[\w.+!]+( \\\n    --hash=sha256:[0-9a-f]{64})+\n")


@pytest.mark.parametrize("name", ["cpu", "cuda", "dev", "litellm"])
def test_every_package_has_one_version_and_its_hashes(name):
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    names = [pin[1] for pin in PIN.finditer(text)]
    assert names
    assert names == sorted(set(names))
    rest = PIN.sub("", text)
    assert all(line.startswith("#") for line in rest.splitlines()), rest


def test_torchs_cpu_build_alone_has_none():
    assert re.fullmatch(r"torch==[\d.]+\+cpu\n", (REQUIREMENTS / "torch-cpu.txt").read_text())


def test_hashes_are_of_what_a_linux_machine_may_take():
    named = {
        "a_b-1.0-py3-none-any.whl": True,
        "a_b-1.0.0-cp311-cp311-manylinux_2_28_x86_64.whl": True,
        "a_b-1.0-cp39-abi3-manylinux_2_17_aarch64.manylinux2014_aarch64.whl": True,
        "a_b-1.0-cp314-cp314t-musllinux_1_2_x86_64.whl": True,
        "a-b-1.0.tar.gz": True,
        "a_b-1.0-cp310-cp310-manylinux_2_28_x86_64.whl": False,
        "a_b-1.0-cp312-cp312-win_amd64.whl": False,
        "a_b-1.0-cp312-cp312-macosx_11_0_arm64.whl": False,
        "a_b-1.0.1-py3-none-any.whl": False,
        "a_b-1.0.post1.tar.gz": False,
        "a_b-1.0-py2.7.egg": False,
    }
    files = [{"filename": name, "hashes": {"sha256": name}} for name in named]
    assert list(lock.hashes(files, "1.0")) == [name for name, fits in named.items() if fits]


def test_a_package_without_a_file_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "files", lambda _: [])
    monkeypatch.setattr(lock, "HERE", tmp_path)
    with pytest.raises(SystemExit, match=r"no file of torch 1\.0 for Linux"):
        lock.write("x.txt", {"torch": "1.0"})
