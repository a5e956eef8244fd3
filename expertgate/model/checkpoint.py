"""A FlexOlmo checkpoint on disk: its configuration and its experts' weights, without vLLM."""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from expertgate.model import quantised
from expertgate.model.quantised import BLOCK, SCALE
from expertgate.policies.expert_set import MAX_EXPERTS

ARCHITECTURE = "FlexOlmoForCausalLM"

# What the model would pass over, and so speak otherwise than Transformers; absent is the first.
_SERVED = {"hidden_act": ("silu", "swish"), "attention_bias": (False, None)}
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
_PLAIN = ("F64", "F32", "F16", "BF16")
_PARTS = ("gate_proj", "up_proj", "down_proj")
_CHUNK_BYTES = 1 << 24
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class CheckpointError(ValueError):
    """A folder that holds no FlexOlmo checkpoint we can serve; one line that says why."""


def locate(model: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `model` itself, or the Hub's id, downloaded by its revision.

    Raises CheckpointError where there is neither.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CheckpointError(f"no such model folder: {model}")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub's client has a dozen kinds; each says what failed
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model} is no folder, and could not be fetched from the Hub: {reason}"
        ) from None


class _Tensor(NamedTuple):
    """Where a tensor is: its bytes begin in `file` at `start`."""

    file: Path
    dtype: str
    shape: list[int]
    start: int


class Checkpoint:
    """Reads safetensors headers only; a tensor's bytes are read when they are hashed."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for a configuration that can't be read or served."""
        self.folder = folder
        path = folder / "config.json"
        try:
            self.config: dict[str, Any] = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        if not isinstance(self.config, dict):
            raise CheckpointError(f"{path}: holds no JSON object")
        architectures = self.config.get("architectures")
        if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
            raise CheckpointError(
                f"{path}: architectures is {architectures}, but this server serves {ARCHITECTURE}"
            )
        # The defaults are those of transformers.
        self.num_experts = _count(self.config.get("num_experts", 7), f"{path}: num_experts")
        self.num_layers = _count(
            self.config.get("num_hidden_layers", 32), f"{path}: num_hidden_layers"
        )
        if self.num_experts > MAX_EXPERTS:
            raise CheckpointError(
                f"{path}: num_experts is {self.num_experts}; 1 to {MAX_EXPERTS} can be served"
            )
        for name, served in _SERVED.items():
            if self.config.get(name, served[0]) not in served:
                raise CheckpointError(
                    f"{path}: {name} is {json.dumps(self.config[name])}, "
                    f"but this server serves {json.dumps(served[0])}"
                )
        self.hidden = _count(self.config.get("hidden_size", 4096), f"{path}: hidden_size")
        self.inner = _count(
            self.config.get("intermediate_size", 11008), f"{path}: intermediate_size"
        )
        settings = self.config.get("quantization_config")
        self.quantised = settings is not None
        """Whether the experts are FP8, by `quantised`'s scheme, which is then all that is."""
        if self.quantised:
            if said := quantised.fault(settings, self.num_layers):
                raise CheckpointError(f"{path}: {said}")
            for name, size in {"hidden_size": self.hidden, "intermediate_size": self.inner}.items():
                if size % BLOCK:
                    raise CheckpointError(
                        f"{path}: {name} is {size}, but quantised experts are served in whole "
                        f"blocks of {BLOCK}"
                    )

    def files(self) -> list[Path]:
        """Of weights: those that the index names, where there is one; else all.

        Raises CheckpointError for an index that can't be read.
        """
        index = self.folder / "model.safetensors.index.json"
        if not index.exists():
            return sorted(self.folder.glob("*.safetensors"))
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except OSError as error:
            raise CheckpointError(f"{index}: {error.strerror or error}") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise CheckpointError(f"{index}: holds no map of weights") from None
        strange = sorted(str(name) for name in names if Path(str(name)).name != name)
        if strange:
            raise CheckpointError(f"{index}: {strange[0]!r} is no file of this folder")
        return sorted(self.folder / name for name in names)

    def check_weights(self) -> None:
        """Raises CheckpointError where a file of weights is missing, is none or ends too soon.

        Also where a tensor is missing or isn't what the configuration says: vLLM leaves a weight
        that it isn't given, or the rest of one that is smaller, as it found the memory.
        """
        wanted = dict(self._wanted())
        for name, (dtypes, shape) in wanted.items():
            found = self._tensor(name)
            if found.dtype not in dtypes or shape not in (None, found.shape):
                raise CheckpointError(
                    f"{found.file}: tensor {name} is {found.dtype} {found.shape}, but by "
                    f"config.json it should be {' or '.join(dtypes)} {shape or ''}".rstrip()
                )
        if self.quantised:  # of others vLLM says so itself
            optional = {"lm_head.weight", *map(_bias, range(self.num_layers))}
            if strange := sorted(self._tensors.keys() - wanted.keys() - optional):
                raise CheckpointError(
                    f"{self._tensors[strange[0]].file}: there is no place for tensor {strange[0]} "
                    "in a FlexOlmo of which only the experts are quantised"
                )

    def _wanted(self) -> Iterator[tuple[str, tuple[tuple[str, ...], list[int] | None]]]:
        """Tensors that there must be, with the dtypes that each may have, and its shape.

        None where vLLM looks at the shape itself.
        """
        whole = ["model.embed_tokens", "model.norm"]
        if not self.config.get("tie_word_embeddings", False):
            whole.append("lm_head")
        attention = [f"self_attn.{part}" for part in ("q_norm", "k_norm")]
        attention += [f"self_attn.{part}_proj" for part in "qkvo"]
        norms = ["post_attention_layernorm", "post_feedforward_layernorm"]
        for layer in range(self.num_layers):
            place = f"model.layers.{layer}"
            whole += [f"{place}.{part}" for part in (*attention, *norms, "mlp.gate")]
            for index in range(self.num_experts):
                for part in _PARTS:
                    shape = [self.inner, self.hidden]
                    if part == "down_proj":
                        shape.reverse()
                    expert = f"{place}.mlp.experts.{index}.{part}"
                    yield f"{expert}.weight", (("F8_E4M3",) if self.quantised else _PLAIN, shape)
                    if self.quantised:
                        yield f"{expert}.{SCALE}", (("F32",), [size // BLOCK for size in shape])
        for name in whole:
            yield f"{name}.weight", (_PLAIN, None)

    def expert_digests(self, indices: Iterable[int]) -> dict[int, str]:
        """Index → SHA-256 over an expert's router row, bias and FFN, with scales, in every layer.

        Each tensor is fed as its name within the layer, its dtype, its shape and its bytes, in a
        fixed order, so the digest does not depend on how the checkpoint is cut into files.
        Raises CheckpointError where a tensor is missing.
        """
        chosen = list(indices)
        with ThreadPoolExecutor() as pool:
            return dict(zip(chosen, pool.map(self._expert_digest, chosen), strict=True))

    def _expert_digest(self, index: int) -> str:
        digest = hashlib.sha256(b"expertgate/expert-weights/1\n")
        for layer in range(self.num_layers):
            mlp = f"model.layers.{layer}.mlp"
            self._feed(digest, f"{layer}.router", f"{mlp}.gate.weight", row=index)
            if index and _bias(layer) in self._tensors:
                self._feed(digest, f"{layer}.bias", _bias(layer), row=index - 1)
            for part in _PARTS:
                expert = f"{mlp}.experts.{index}.{part}"
                self._feed(digest, f"{layer}.{part}", f"{expert}.weight")
                if self.quantised:
                    self._feed(digest, f"{layer}.{part}.scales", f"{expert}.{SCALE}")
        return digest.hexdigest()

    def _feed(self, digest: Any, label: str, name: str, row: int | None = None) -> None:
        """The tensor called `name`, or one row of it, into `digest`."""
        file, dtype, shape, start = self._tensor(name)
        if row is not None:
            shape = shape[1:]
        if dtype not in _DTYPE_BYTES or (dtype not in _PLAIN and not self.quantised):
            raise CheckpointError(f"{file}: tensor {name} has the unexpected dtype {dtype}")
        size = _DTYPE_BYTES[dtype]
        for dimension in shape:
            size *= dimension
        digest.update(f"{label} {dtype} {shape}\n".encode())
        with file.open("rb") as opened:
            opened.seek(start + (row or 0) * size)
            while size:
                chunk = opened.read(min(size, _CHUNK_BYTES))
                if not chunk:
                    raise CheckpointError(f"{file}: ends within tensor {name}")
                digest.update(chunk)
                size -= len(chunk)

    def _tensor(self, name: str) -> _Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing") from None

    @cached_property
    def _tensors(self) -> dict[str, _Tensor]:
        """By their names; only of the files that vLLM loads. Raises CheckpointError."""
        found: dict[str, _Tensor] = {}
        for path in self.files():
            # The format: eight bytes of length, a JSON header, the tensors' bytes.
            try:
                with path.open("rb") as file:
                    (length,) = struct.unpack("<Q", file.read(8))
                    header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
                    size = file.seek(0, os.SEEK_END)
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    if name in found:
                        raise CheckpointError(
                            f"{path}: tensor {name} is also in {found[name].file.name}"
                        )
                    begin, end = entry["data_offsets"]
                    if 8 + length + end > size:  # as where a download was broken off
                        raise CheckpointError(f"{path}: ends within tensor {name}")
                    start = 8 + length + begin
                    found[name] = _Tensor(path, entry["dtype"], entry["shape"], start)
            except CheckpointError:
                raise
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror or error}") from None
            except (struct.error, ValueError, LookupError, TypeError, AttributeError):
                raise CheckpointError(f"{path}: not a safetensors file") from None
        if not found:
            raise CheckpointError(f"{self.folder}: no *.safetensors files")
        return found


def _bias(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.expert_bias"


def _count(value: object, place: str) -> int:
    """The value itself. Raises CheckpointError where it counts nothing."""
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{place} is {value!r}; it must be a whole number, at least 1")
    return value
