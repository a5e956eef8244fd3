"""Every kernel becomes machine code for Hopper; that takes a compiler, but no GPU."""

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
SHARED_MEMORY = 227 * 1024


class _Hopper:
    """As much of a driver as the compiler asks for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, _=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


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
    monkeypatch.setattr(driver, "_active", _Hopper())
    return made


@pytest.mark.parametrize(
    ("T", "instructions"),
    [
        pytest.param(1, ["wgmma.mma_async"], id="decode"),
        pytest.param(8192, ["wgmma.mma_async", "cp.async.bulk.tensor"], id="prefill"),
    ],
)
def test_the_layer_compiles_for_hopper(compiled, T, instructions):
    def tensor(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    device = Device("unknown", (9, 0), 132)
    shape = choose(device, T=T, E=E, H=H, I=I, dtype=torch.bfloat16)
    masks = tensor(T, dtype=torch.int64)
    logits = routing.mask_logits(tensor(T, E), masks, tensor(E - 1))
    plan = routing.route(logits, masks, top_k=TOP_K)
    layer.experts(tensor(T, H), plan, tensor(E, 2 * I, H), tensor(E, H, I), shape=shape)

    assert len(compiled) == (6 if T == 1 else 7), list(compiled)
    for name, kernel in compiled.items():
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"]), name  # no atomics
        assert kernel.metadata.shared <= SHARED_MEMORY, name
    for name in ("_gate_up_kernel", "_down_kernel"):
        for instruction in instructions:
            assert instruction in compiled[name].asm["ptx"], (name, instruction)
