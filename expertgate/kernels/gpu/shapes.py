"""How the two grouped products are cut into tiles: by rule, or as measured on this very GPU.

Dimensions: T tokens, E experts, K slots, H hidden, I inner.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"
"""A file for each GPU that `python -m benchmarks.tune` was run on: `tuned/README.md`."""

_HOPPER = (9, 0)


@dataclass(frozen=True)
class Tiles:
    """How one grouped product is cut. A row is a (token, expert) pair, a column an output."""

    block_m: int
    """Rows of a tile; all of one expert."""
    block_n: int
    """Columns of a tile; of gate and up each."""
    block_k: int
    """How much of the summed dimension one step loads."""
    num_warps: int
    num_stages: int
    """Steps whose loads are in flight at once."""
    group_m: int = 1
    """Row tiles that run side by side, so that they find one another's weights in the cache."""
    split_k: int = 1
    """Programs that share the sum of one tile, each writing a float32 part; `down` only."""
    swap: bool = False
    """Weights times rows instead of rows times weights: a narrow tile fills Hopper's 64 rows."""
    descriptors: bool = False
    """Weights through tensor descriptors, which Hopper and later load by themselves."""
    programs_per_sm: int = 0
    """Programs that stay on each multiprocessor and take tile after tile; 0 = one for each tile."""


@dataclass(frozen=True)
class Shape:
    """Within one shape a token's result depends on that token alone, bit for bit."""

    gate_up: Tiles
    down: Tiles

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Shape":
        return cls(Tiles(**value["gate_up"]), Tiles(**value["down"]))


@dataclass(frozen=True)
class Device:
    """What a rule needs to know of a GPU."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int

    @classmethod
    @lru_cache
    def of(cls, device: torch.device) -> "Device":
        if device.type != "cuda":
            return cls("interpreter", _HOPPER, 4)
        found = torch.cuda.get_device_properties(device)
        return cls(found.name, (found.major, found.minor), found.multi_processor_count)


def choose(
    device: Device,
    *,
    T: int,
    E: int,
    H: int,
    I: int,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> Shape:
    """The shape for T tokens: measured where there is a measurement, else by rule.

    `deterministic`: the same shape whatever T is.
    """
    if deterministic:
        return _fixed(dtype)
    name = str(dtype).removeprefix("torch.")
    measured = _measured(device.name).get((E, H, I, name))
    if not measured:
        return _by_rule(device, T, E, dtype)
    return next((shape for tokens, shape in measured if tokens >= T), measured[-1][1])


def _fixed(dtype: torch.dtype) -> Shape:
    """Tiles that are never good at anything and never bad."""
    k = 32 if dtype.itemsize == 4 else 64
    return Shape(
        Tiles(32, 64, k, num_warps=4, num_stages=3),
        Tiles(32, 64, k, num_warps=4, num_stages=3),
    )


def _by_rule(device: Device, T: int, E: int, dtype: torch.dtype) -> Shape:
    """What arithmetic says should be good; nothing here has been measured on a GPU yet.

    docs/kernels-log.md has the sums behind the numbers.
    """
    hopper = device.capability >= _HOPPER
    if dtype.itemsize == 4:
        # Full float32 has no matrix cores to feed; this fits anywhere.
        tiles = Tiles(16 if T <= 16 else 32, 64, 32, num_warps=4, num_stages=2, group_m=8)
        return Shape(tiles, tiles)
    return _streaming(T, E, hopper) if T <= 128 else _computing(T, hopper)


def _streaming(T: int, E: int, hopper: bool) -> Shape:
    """Few tokens wait for weights: one row tile an expert, and all column tiles at once.

    Steps of 64 by 64 are 8 KiB of weights, gate and up together 16; so short that two or three
    programs fit a multiprocessor, and one loads while another begins or ends.
    """
    rows = max(16, 1 << (T - 1).bit_length())
    tiles = Tiles(rows, 64, 64, num_warps=4, num_stages=4, swap=hopper and rows < 64)
    # H = 4096 has 64 such tiles an expert: split until two experts fill the multiprocessors.
    down = replace(tiles, split_k=4 if E <= 16 else 1)
    if hopper:
        return Shape(tiles, down)
    # 99 KiB of shared memory on the smallest.
    return Shape(replace(tiles, block_n=32, num_stages=3), replace(down, num_stages=3))


def _computing(T: int, hopper: bool) -> Shape:
    """Many tokens wait for arithmetic: the largest tiles that fit, on programs that stay."""
    if hopper and T > 512:
        large = Tiles(128, 128, 64, 8, 3, group_m=8, descriptors=True, programs_per_sm=1)
        return Shape(large, replace(large, block_n=256))
    if hopper:
        tiles = Tiles(64, 128, 64, num_warps=8, num_stages=3, group_m=4)
        return Shape(tiles, tiles)
    if T > 512:
        tiles = Tiles(128, 64, 32, num_warps=8, num_stages=3, group_m=8)
        return Shape(tiles, replace(tiles, block_n=128))
    tiles = Tiles(64, 64, 64, num_warps=4, num_stages=3, group_m=4)
    return Shape(tiles, replace(tiles, block_n=128))


_Key = tuple[int, int, int, str]


@lru_cache
def _measured(device_name: str) -> dict[_Key, list[tuple[int, Shape]]]:
    """(E, H, I, dtype) → the shapes found for this GPU, by the most tokens each was found for."""
    path = TUNED / f"{device_name.replace(' ', '_')}.json"
    if not path.exists():
        return {}
    found: dict[_Key, list[tuple[int, Shape]]] = {}
    for layer in json.loads(path.read_text())["layers"]:
        rows = [(row["tokens"], Shape.from_json(row["shape"])) for row in layer["shapes"]]
        key = (layer["experts"], layer["hidden"], layer["inner"], layer["dtype"])
        found[key] = sorted(rows, key=lambda row: row[0])
    return found
