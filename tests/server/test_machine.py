"""What a machine lacks is one line before the engine starts."""

import sys
from types import SimpleNamespace

import pytest

from expertgate.model.checkpoint import Checkpoint
from expertgate.server import machine
from expertgate.server.refusals import SettingError


def test_weights_that_do_not_fit_are_a_line(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["FlexOlmoForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(b"x" * 3000)
    model = Checkpoint(tmp_path)
    machine.check_memory(model, 3000)
    with pytest.raises(SettingError, match="larger machine"):
        machine.check_memory(model, 2999)
    # What the engine doesn't load takes none, as the same weights once more in another format.
    (tmp_path / "consolidated.safetensors").write_bytes(b"x" * 3000)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    machine.check_memory(model, 3000)


def test_memory_that_is_not_free_is_a_line(monkeypatch):
    """VLLM takes a part of all where nobody says less, and tells so behind two tracebacks."""

    def check(free, nodes=(0,), **cache):
        memory = SimpleNamespace(total_memory=100e9, available_memory=free)
        monkeypatch.setattr(machine, "get_visible_memory_node", lambda: list(nodes))
        monkeypatch.setattr(machine, "get_memory_node_info", lambda _: memory)
        said = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.92, **cache}
        machine.check_free(SimpleNamespace(**said))

    check(92e9)
    check(10e9, gpu_memory_utilization=0.1)
    check(10e9, kv_cache_memory_bytes=1 << 30)
    check(10e9, nodes=(0, 1))
    with pytest.raises(
        SettingError, match=r"would take 0\.92 of 100\.0 GB.*91\.0 GB are free: say"
    ):
        check(91e9)


def test_a_gpu_without_a_c_compiler_is_a_line(tmp_path, monkeypatch):
    """Triton asks for one when the first kernel runs, with the weights loaded."""
    (tmp_path / "Python.h").touch()
    machine.check_c_compiler({"CC": sys.executable}, tmp_path)
    with pytest.raises(SettingError, match=r"'no-such'.*install gcc, or name another by CC"):
        machine.check_c_compiler({"CC": "no-such"}, tmp_path)
    with pytest.raises(SettingError, match=r"none/Python\.h.*Triton.*install them"):
        machine.check_c_compiler({"CC": sys.executable}, tmp_path / "none")
    found = []
    monkeypatch.setattr(machine.shutil, "which", lambda name: name if name in found else None)
    with pytest.raises(SettingError, match="there is no 'gcc' or 'clang'"):
        machine.check_c_compiler({}, tmp_path)
    found.append("clang")
    machine.check_c_compiler({}, tmp_path)


def test_a_machine_without_a_compiler_is_a_line(tmp_path):
    (tmp_path / "Python.h").touch()
    machine.check_cpp_compiler({"CXX": sys.executable}, tmp_path)
    machine.check_cpp_compiler({"CXX": "no-such", "TORCH_COMPILE_DISABLE": "1"}, tmp_path / "none")
    with pytest.raises(SettingError, match=r"'no-such'.*install g\+\+"):
        machine.check_cpp_compiler({"CXX": "no-such"}, tmp_path)
    with pytest.raises(SettingError, match=r"none/Python\.h.*install them"):
        machine.check_cpp_compiler({"CXX": sys.executable}, tmp_path / "none")


@pytest.fixture
def nothing_loaded(monkeypatch, tmp_path):
    """The folder where vLLM's libraries lie, none of which was loaded."""
    monkeypatch.setattr(machine.torch, "ops", SimpleNamespace(_C=SimpleNamespace()))
    monkeypatch.setattr(machine.vllm, "__file__", str(tmp_path / "__init__.py"))
    return tmp_path


def test_kernels_that_cannot_be_loaded_are_a_line_with_the_reason(nothing_loaded):
    """On a machine without libnuma.so.1 vLLM's worker missed `init_cpu_memory_env`."""
    (nothing_loaded / "_C.abi3.so").write_bytes(b"no library")
    with pytest.raises(SettingError, match=r"_C\.abi3\.so: .*: install what is missing"):
        machine.check_kernels()


def test_so_are_those_that_are_not_there(nothing_loaded):
    with pytest.raises(SettingError, match="make clean install"):
        machine.check_kernels()
