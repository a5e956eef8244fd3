"""Random FlexOlmo checkpoints in Hugging Face's own format, small enough for two cores."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a few special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
    )


def random_checkpoint(
    folder: Path,
    *,
    num_experts: int = 7,
    top_k: int = 5,
    hidden: int = 128,
    inner: int = 256,
    layers: int = 3,
    seed: int = 0,
    biases: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes a FlexOlmo of random weights, large enough that its experts disagree, to `folder`."""
    words = tokenizer()
    config = FlexOlmoConfig(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = FlexOlmoForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                # Wide enough that experts, and so expert sets, change the answer.
                scale = 1.0 if "gate.weight" in name else 0.1
                parameter.normal_(0, 1.0 if "embed" in name else scale)
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    # Transformers splits where the next tensor would pass the limit, so this gives `shards` files.
    model.to(dtype).save_pretrained(folder, max_shard_size=size if shards == 1 else size // shards)
    words.save_pretrained(folder)
    if biases:
        _add_biases(folder, config, dtype)
    return folder


def _add_biases(folder: Path, config: FlexOlmoConfig, dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(1)
    for layer in range(config.num_hidden_layers):
        # Positive ones too: only min(bias, 0) may be added.
        bias = torch.randn(config.num_experts - 1, generator=generator)
        tensors[f"model.layers.{layer}.mlp.gate.expert_bias"] = bias.to(dtype)
    save_file(tensors, path, metadata={"format": "pt"})
