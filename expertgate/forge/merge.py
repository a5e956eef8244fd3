"""Merging: owners' experts side by side in one model, nothing trained (section 3.3.2)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from expertgate.forge.network import Tensors
from expertgate.forge.train import Anchor


class MergeError(ValueError):
    """A contribution that did not keep the anchor as it was."""


@dataclass(frozen=True)
class Contribution:
    """What an owner hands in: the anchor as it was trained beside, and the new expert."""

    anchor: Anchor
    expert: Tensors


def merge(anchor: Anchor, contributions: Mapping[str, Contribution]) -> list[Tensors]:
    """The experts of the merged model: the public one, then one a contribution, in order.

    Raises MergeError with the name of the first frozen tensor whose bits differ from the anchor's:
    an expert fits only the attention and the public expert that it was trained beside.
    """
    for owner, contribution in contributions.items():
        _check(f"{owner}: shared tensor", anchor.shared, contribution.anchor.shared)
        _check(f"{owner}: tensor of the public expert", anchor.public, contribution.anchor.public)
        _check_shapes(owner, anchor.public, contribution.expert)
    return [anchor.public, *(contribution.expert for contribution in contributions.values())]


def _check(what: str, anchor: Tensors, found: Tensors) -> None:
    if odd := sorted(anchor.keys() ^ found.keys()):
        place = "is missing" if odd[0] in anchor else "is not in the anchor"
        raise MergeError(f"{what} {odd[0]} {place}; every one of the anchor's belongs there")
    for name, tensor in anchor.items():
        other = found[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            raise MergeError(
                f"{what} {name} is {_kind(other)}, but the anchor's is {_kind(tensor)}"
            )
        changed = int((_bytes(tensor) != _bytes(other)).sum())
        if changed:
            raise MergeError(
                f"{what} {name} was frozen, but {changed} of its {_bytes(tensor).numel()} bytes "
                "differ from the anchor's: train the expert again beside this anchor"
            )


def _check_shapes(owner: str, public: Tensors, expert: Tensors) -> None:
    if odd := sorted(public.keys() ^ expert.keys()):
        raise MergeError(f"{owner}: the expert and the public one differ in having {odd[0]}")
    for name, tensor in public.items():
        if tensor.shape != expert[name].shape:
            raise MergeError(
                f"{owner}: the expert's {name} is {_kind(expert[name])}, but the public one's is "
                f"{_kind(tensor)}"
            )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Bits, not values: 0.0 equals -0.0, and NaN differs from itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
