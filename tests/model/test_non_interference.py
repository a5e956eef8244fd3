"""Design, Exactness 2: fill the excluded experts with NaN, and nothing moves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertgate.policies.expert_set import ExpertSet
from tests.support.checkpoints import random_checkpoint
from tests.support.engine import Ask, engine

POISONED = ExpertSet.of([2, 5])
CLEAN = ExpertSet.first(7) - POISONED
BLOCKS = 24
"""Of the cache, so few that each was used before."""


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("healthy"), biases=True)


@pytest.fixture(scope="module")
def poisoned(healthy, tmp_path_factory):
    """The same checkpoint with NaN in every weight of two experts: FFNs, router rows, biases."""
    folder = tmp_path_factory.mktemp("poisoned")
    for file in healthy.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    poison(folder / "model.safetensors")
    return folder


def poison(path: Path) -> None:
    tensors = load_file(path)
    for name, tensor in tensors.items():
        for expert in POISONED:
            if f".experts.{expert}." in name:
                tensor.fill_(torch.nan)
            elif name.endswith("gate.weight"):
                tensor[expert] = torch.nan
            elif name.endswith("gate.expert_bias"):
                tensor[expert - 1] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def answers(folder, **arguments):
    """Of a fresh engine, and of one whose cache is full of what the poisoned experts left."""
    subsets = [ExpertSet(mask) for mask in range(1, 128) if ExpertSet(mask) <= CLEAN]
    asks = [Ask(list(range(60)), experts, 10) for experts in subsets]
    # In the same batch, so that rows full of NaN lie next to those that must stay clean.
    neighbours = [Ask(list(range(90)), ExpertSet.first(7), 10), Ask([7] * 20, POISONED, 10)]
    used = [Ask([i] * 120, POISONED, 4) for i in range(BLOCKS)]
    with engine(folder, num_gpu_blocks_override=BLOCKS, **arguments) as served:
        fresh = served.ask([*asks, *neighbours])[: len(asks)]
        served.forget()
        served.ask(used)
        served.forget()
        return fresh, served.ask([*asks, *neighbours])[: len(asks)]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
        pytest.param({"dtype": "float32"}, id="float32"),
        pytest.param({"dtype": "bfloat16", "enforce_eager": False}, id="compiled"),
        pytest.param({"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, id="fp8-cache"),
    ],
)
def test_nan_in_excluded_experts_changes_no_bit(healthy, poisoned, arguments):
    fresh, later = answers(healthy, **arguments)
    fresh_beside_nan, later_beside_nan = answers(poisoned, **arguments)
    assert fresh_beside_nan == fresh
    # Attention multiplies by whole groups of tokens: what a block held behind the last by zero.
    assert later_beside_nan == later
