"""Which tiles are chosen: as measured, else by rule, or one shape for any number of tokens."""

import json
from dataclasses import asdict

import pytest
import torch

from expertgate.kernels.gpu import shapes
from expertgate.kernels.gpu.shapes import Device, Shape, Tiles, choose

H200 = Device("NVIDIA H200", (9, 0), 132)
FLEXOLMO = {"E": 7, "H": 4096, "I": 11008, "dtype": torch.bfloat16}
SMALL, LARGE = (Shape(Tiles(n, n, n, 4, 2), Tiles(n, n, n, 4, 2, split_k=2)) for n in (16, 64))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    layer = {
        "experts": 7,
        "hidden": 4096,
        "inner": 11008,
        "dtype": "bfloat16",
        "shapes": [
            {"tokens": 64, "shape": asdict(LARGE), "gate_up_us": 2.0},
            {"tokens": 8, "shape": asdict(SMALL), "gate_up_us": 1.0},
        ],
    }
    (tmp_path / "NVIDIA_H200.json").write_text(json.dumps({"how": {}, "layers": [layer]}))
    monkeypatch.setattr(shapes, "TUNED", tmp_path)
    shapes._measured.cache_clear()
    yield
    shapes._measured.cache_clear()


@pytest.mark.parametrize(
    ("T", "want"), [(1, SMALL), (8, SMALL), (9, LARGE), (64, LARGE), (9999, LARGE)]
)
def test_what_was_measured_for_at_least_as_many_tokens_is_chosen(measured, T, want):
    assert choose(H200, T=T, **FLEXOLMO) == want


@pytest.mark.parametrize(
    "other", [{"H": 2048}, {"I": 5504}, {"E": 8}, {"dtype": torch.float16}], ids=str
)
def test_a_measurement_is_of_one_layer_alone(measured, other):
    assert choose(H200, T=1, **(FLEXOLMO | other)) not in (SMALL, LARGE)


def test_a_measurement_is_of_one_gpu_alone(measured):
    assert choose(Device("NVIDIA H100", (9, 0), 132), T=1, **FLEXOLMO) not in (SMALL, LARGE)


def test_deterministic_is_one_shape_whatever_was_measured(measured):
    fixed = {choose(H200, T=T, deterministic=True, **FLEXOLMO) for T in (1, 64, 256, 8192)}
    assert len(fixed) == 1
    assert not fixed & {SMALL, LARGE}


def test_few_tokens_are_cut_otherwise_than_many():
    assert len({choose(H200, T=T, **FLEXOLMO) for T in (1, 64, 256, 8192)}) == 4


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("T", [1, 16, 17, 64, 128, 129, 512, 513, 100_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_rule_fits_its_gpu(capability, T, dtype):
    """By the operands of all steps in flight; Ampere's smallest has 99 KiB, Hopper 227."""
    device = Device("unknown", capability, 100)
    shape = choose(device, T=T, E=7, H=4096, I=11008, dtype=dtype)
    room = (227 if capability >= (9, 0) else 99) * 1024
    for tiles, columns in ((shape.gate_up, 2), (shape.down, 1)):
        rows = tiles.block_m + columns * tiles.block_n
        assert tiles.num_stages * rows * tiles.block_k * dtype.itemsize <= room
        assert capability >= (9, 0) or not (tiles.descriptors or tiles.swap)
