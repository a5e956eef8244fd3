"""Checkpoints to measure on: the demo's, random ones, and ones with rows deleted."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.machine import ROOT
from expertgate.model.checkpoint import ARCHITECTURE
from expertgate.policies.expert_set import ExpertSet

DEMO = ROOT / "expertgate" / "demo" / "model"
BUILD = ROOT / "build" / "benchmarks"

SHAPES: dict[str, dict[str, int]] = {
    "random-0.5b": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "num_experts": 7,
        "num_experts_per_tok": 5,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    # FlexOlmo-7x7B-1T's own; 67 GB, so weights are not written but made up by the engine.
    "shape-7x7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_experts": 7,
        "num_experts_per_tok": 5,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
    },
}

_BIAS = "mlp.gate.expert_bias"
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)(\..*)")


def locate(name: str) -> tuple[Path, bool]:
    """The folder of a model, made if it is one of SHAPES; whether its weights are to be made up.

    A checkpoint with router biases is copied without them, so that all contenders load the same.
    """
    if name not in SHAPES:
        given = Path(name)
        if not _has_biases(given):
            return given, False
        everyone = ExpertSet.first(num_experts(given))
        return without_others(given, everyone, BUILD / f"{given.name}-unbiased"), False
    folder = BUILD / name
    dummy = name == "shape-7x7b"
    if not (folder / "config.json").exists():
        _make(folder, SHAPES[name], weights=not dummy)
    return folder, dummy


def _has_biases(folder: Path) -> bool:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if any(name.endswith(_BIAS) for name in file.keys()):  # noqa: SIM118  # no mapping
                return True
    return False


def _make(folder: Path, shape: dict[str, int], *, weights: bool) -> None:
    from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

    config = FlexOlmoConfig(
        **shape, eos_token_id=0, pad_token_id=1, bos_token_id=None, dtype=torch.bfloat16
    )
    folder.mkdir(parents=True, exist_ok=True)
    _copy_tokenizer(DEMO, folder)
    if weights:
        torch.manual_seed(0)
        FlexOlmoForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    else:
        config.architectures = [ARCHITECTURE]
        config.save_pretrained(folder)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for path in source.glob("*token*.json"):
        shutil.copy(path, folder)


def num_experts(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["num_experts"])


def without_others(source: Path, kept: ExpertSet, folder: Path) -> Path:
    """The checkpoint at `source` with every router row and FFN deleted that isn't of `kept`.

    Router biases go too: none of the peers can load a checkpoint that has them.
    """
    indices = list(kept)
    config = json.loads((source / "config.json").read_text())
    config["num_experts"] = len(indices)
    config["num_experts_per_tok"] = min(config["num_experts_per_tok"], len(indices))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    _copy_tokenizer(source, folder)
    tensors = {}
    for path in source.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            expert = _EXPERT.fullmatch(name)
            if name.endswith("mlp.gate.weight"):
                tensors[name] = tensor[indices].contiguous()
            elif name.endswith(_BIAS):
                continue
            elif expert is None:
                tensors[name] = tensor
            elif int(expert[2]) in indices:
                tensors[f"{expert[1]}{indices.index(int(expert[2]))}{expert[3]}"] = tensor
    if tensors:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weight_bytes(folder: Path) -> int:
    """What the weights take in bf16, from the shape alone."""
    c = json.loads((folder / "config.json").read_text())
    hidden, head = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
    attention = hidden * head * 2 * (c["num_attention_heads"] + c["num_key_value_heads"])
    experts = c["num_experts"] * (3 * hidden * c["intermediate_size"] + hidden)
    layers = c["num_hidden_layers"] * (attention + experts)
    return 2 * int(layers + 2 * c["vocab_size"] * hidden)
