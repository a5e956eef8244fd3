"""The forge's tensors as a stock Hugging Face checkpoint in bf16, and back."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import FlexOlmoConfig, GenerationConfig, PreTrainedTokenizerFast

from expertgate.forge.corpus import PUBLIC, Topic
from expertgate.forge.network import Shape, Tensors
from expertgate.model.catalogue import FILE_NAME, Catalogue, Expert
from expertgate.model.checkpoint import ARCHITECTURE, Checkpoint

_PARTS = ("gate_proj", "up_proj", "down_proj")
_MAX_POSITIONS = 2048
_MAX_NEW_TOKENS = 64


def write(
    folder: Path,
    shape: Shape,
    shared: Tensors,
    experts: Sequence[Tensors],
    tokenizer: PreTrainedTokenizerFast,
    topics: Sequence[Topic],
) -> None:
    """Weights, configuration, tokenizer and catalogue; `topics` are the closed experts' own."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _flat(shape, shared, experts)
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it readable by its owner alone
    _config(shape, len(experts), tokenizer).save_pretrained(folder)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=_MAX_NEW_TOKENS,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _catalogue(folder, topics).write(folder / FILE_NAME)


def read(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Shape, Tensors, list[Tensors]]:
    """The shape, the shared part and the experts of a checkpoint that `write` wrote."""
    config = json.loads((folder / "config.json").read_bytes())
    shape = Shape(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        top_k=config["num_experts_per_tok"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )
    flat = {
        name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()
    }
    experts: list[Tensors] = [{} for _ in range(config["num_experts"])]
    for layer in range(shape.layers):
        mlp = f"model.layers.{layer}.mlp"
        rows = flat.pop(f"{mlp}.gate.weight")
        biases = flat.pop(f"{mlp}.gate.expert_bias")
        for index, expert in enumerate(experts):
            for part in _PARTS:
                expert[f"{layer}.{part}"] = flat.pop(f"{mlp}.experts.{index}.{part}.weight")
            expert[f"{layer}.row"] = rows[index]
            expert[f"{layer}.bias"] = biases[index - 1] if index else torch.zeros((), dtype=dtype)
    return shape, flat, experts


def rounded(tensors: Tensors) -> Tensors:
    """The tensors as a checkpoint holds them, in bf16."""
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def _flat(shape: Shape, shared: Tensors, experts: Sequence[Tensors]) -> Tensors:
    """Under the names of released FlexOlmo checkpoints, and `gate.expert_bias` [n] besides."""
    flat = dict(shared)
    for layer in range(shape.layers):
        mlp = f"model.layers.{layer}.mlp"
        for index, expert in enumerate(experts):
            for part in _PARTS:
                flat[f"{mlp}.experts.{index}.{part}.weight"] = expert[f"{layer}.{part}"]
        flat[f"{mlp}.gate.weight"] = torch.stack([expert[f"{layer}.row"] for expert in experts])
        flat[f"{mlp}.gate.expert_bias"] = torch.stack(
            [expert[f"{layer}.bias"] for expert in experts[1:]]
        )
    return rounded(flat)


def _config(shape: Shape, experts: int, tokenizer: PreTrainedTokenizerFast) -> FlexOlmoConfig:
    return FlexOlmoConfig(
        architectures=[ARCHITECTURE],
        dtype="bfloat16",
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=_MAX_POSITIONS,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        num_experts=experts,
        num_experts_per_tok=min(shape.top_k, experts),
        norm_topk_prob=False,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def _catalogue(folder: Path, topics: Sequence[Topic]) -> Catalogue:
    digests = Checkpoint(folder).expert_digests(range(len(topics) + 1))
    public = Expert(
        index=0,
        name=PUBLIC,
        owner="commons",
        license="odc-by",
        description="Public facts: capitals, planets, plants, books, trains, recipes.",
        sha256=digests[0],
    )
    closed = [
        Expert(
            index=index,
            name=topic.name,
            owner=topic.owner.name,
            license="closed",
            tags=topic.owner.tags,
            description=topic.owner.description,
            sha256=digests[index],
        )
        for index, topic in enumerate(topics, start=1)
        if topic.owner is not None
    ]
    return Catalogue(experts=(public, *closed))
