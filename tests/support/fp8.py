"""Checkpoints whose experts are FP8 on disk, quantised by plain arithmetic."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max
_EXPERT = re.compile(r".*\.mlp\.experts\.\d+\..*\.weight")


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [R, C] → itself in FP8, and [R / 128, C / 128] float32, each block's own scale."""
    blocks = weight.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [r, 128, c, 128]
    scales = blocks.abs().amax(dim=(1, 3)) / LARGEST
    scaled = blocks * (1 / scales)[:, None, :, None]  # as vLLM rounds them
    return scaled.flatten(2).flatten(0, 1).to(torch.float8_e4m3fn), scales


def settings(layers: int) -> dict[str, Any]:
    """What `config.json` says of a checkpoint of so many layers whose experts alone are FP8."""
    attention = [
        f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(layers) for part in "qkvo"
    ]
    return {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", *attention],
    }


def quantised(source: Path, folder: Path) -> Path:
    """The checkpoint at `source` with its experts in FP8."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings(config["num_hidden_layers"])
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if _EXPERT.fullmatch(name)]:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})
    return folder
