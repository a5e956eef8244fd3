"""Every kernel becomes machine code for each kind of GPU; that takes a compiler, but no GPU."""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from expertgate.kernels.gpu import layer, routing
from expertgate.kernels.gpu.shapes import Device, choose

E, TOP_K, H, I = 7, 5, 4096, 11008  # FlexOlmo-7x7B
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
"""How much shared memory a program may have: Ampere's, Ada's, Hopper's and Blackwell's."""


class _Driver:
    """As much of one as the compiler asks for."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_device(self):
        return self.architecture  # what was compiled is kept by device

    def get_current_stream(self, _=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Kernel's name → what it was compiled to, of all that are launched from here on."""
    if triton.knobs.runtime.interpret:
        pytest.skip("this process interprets")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    made = {}
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        made[self.__name__] = run(self, *arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return made


def compile_layer(monkeypatch, architecture, T, dtype):
    """Launches the layer as on a GPU of this architecture; nothing runs."""

    def tensor(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    monkeypatch.setattr(driver, "_active", _Driver(architecture))
    device = Device("unknown", divmod(architecture, 10), 132)
    shape = choose(device, T=T, E=E, H=H, I=I, dtype=dtype)
    masks = tensor(T, dtype=torch.int64)
    copy = tensor(T, E, dtype=torch.float32)
    logits = routing.mask_logits(tensor(T, E), masks, tensor(E - 1), copy)
    plan = routing.route(logits, masks, top_k=TOP_K)
    layer.experts(tensor(T, H), plan, tensor(E, 2 * I, H), tensor(E, H, I), shape=shape)


@pytest.mark.parametrize("T", [1, 128, 8192])
@pytest.mark.parametrize("architecture", SHARED_KIB)
def test_the_layer_fits_every_architecture(compiled, monkeypatch, architecture, T):
    compile_layer(monkeypatch, architecture, T, torch.bfloat16)
    assert len(compiled) == (7 if T == 8192 else 6), list(compiled)
    for name, kernel in compiled.items():
        assert kernel.metadata.target.arch == architecture
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"]), name  # no atomics
        assert kernel.metadata.shared <= SHARED_KIB[architecture] * 1024, name


@pytest.mark.parametrize("T", [1, 8192])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_layer_compiles_for_the_other_dtypes(compiled, monkeypatch, dtype, T):
    compile_layer(monkeypatch, 89, T, dtype)
    for name, kernel in compiled.items():
        assert kernel.metadata.shared <= SHARED_KIB[89] * 1024, name


@pytest.mark.parametrize(
    ("T", "instructions"),
    [
        pytest.param(1, ["wgmma.mma_async"], id="decode"),
        pytest.param(8192, ["wgmma.mma_async", "cp.async.bulk.tensor"], id="prefill"),
    ],
)
def test_hopper_gets_its_own_instructions(compiled, monkeypatch, T, instructions):
    compile_layer(monkeypatch, 90, T, torch.bfloat16)
    for name in ("_gate_up_kernel", "_down_kernel"):
        for instruction in instructions:
            assert instruction in compiled[name].asm["ptx"], (name, instruction)
