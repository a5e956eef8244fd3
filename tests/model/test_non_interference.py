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


def answers(folder, used=(), **arguments):
    """`used`: who was served before, and is gone."""
    subsets = [ExpertSet(mask) for mask in range(1, 128) if ExpertSet(mask) <= CLEAN]
    asks = [Ask(list(range(60)), experts, 10) for experts in subsets]
    # In the same batch, so that rows full of NaN lie next to those that must stay clean.
    neighbours = [Ask(list(range(90)), ExpertSet.first(7), 10), Ask([7] * 20, POISONED, 10)]
    with engine(folder, **arguments) as served:
        if used:
            served.ask(used)
            served.forget()
        return [answer for [answer] in served.ask([*asks, *neighbours])][: len(asks)]


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
    both = (answers(folder, **arguments) for folder in (healthy, poisoned))
    for clean, dirty in zip(*both, strict=True):
        assert clean.tokens == dirty.tokens
        assert clean.logprobs == dirty.logprobs


@pytest.mark.parametrize(
    ("dtype", "cache"), [("bfloat16", "auto"), ("float32", "auto"), ("bfloat16", "fp8")]
)
def test_nan_that_a_block_of_the_cache_held_is_not_read_again(healthy, poisoned, dtype, cache):
    """Attention multiplies by whole groups of tokens: what is behind the last one by zero."""
    blocks = 24
    used = [Ask([i] * 120, POISONED, 4) for i in range(blocks)]
    small = {"dtype": dtype, "kv_cache_dtype": cache, "num_gpu_blocks_override": blocks}
    both = (answers(folder, used, **small) for folder in (healthy, poisoned))
    for clean, dirty in zip(*both, strict=True):
        assert clean.tokens == dirty.tokens
        assert clean.logprobs == dirty.logprobs
