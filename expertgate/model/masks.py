"""Which experts each token of the running batch may consult: one buffer, filled by both runners.

Dimensions: T tokens of a step, R requests of a step.
"""

from collections.abc import Mapping
from typing import Any

import torch

from expertgate.kernels.routing import excluded_by
from expertgate.policies.expert_set import MAX_EXPERTS, PUBLIC_ONLY, ExpertSet

EXTRA_ARG = "expertgate_mask"
"""The key of `SamplingParams.extra_args` under which the guarded engine writes a request's mask."""


def requested(extra_args: Mapping[str, Any] | None) -> ExpertSet:
    """The expert set that the guarded engine wrote; `public` alone where it wrote none.

    Anything but a mask of 64 bits counts as none: what can't be understood opens nothing.
    """
    mask = (extra_args or {}).get(EXTRA_ARG)
    if type(mask) is not int or not 0 <= mask < 1 << MAX_EXPERTS:
        return PUBLIC_ONLY
    return ExpertSet(mask)


class TokenMasks:
    """A persistent int64 word for each scheduled token, on the device, read by every MoE layer.

    It has one address for the life of the process, because a replayed CUDA graph reads what stood
    at that address when it was captured. At rest every word says `public` only; `arm` opens what
    the requests of one real step may consult, and `rest` closes it again.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.words = torch.full((max_tokens,), PUBLIC_ONLY.signed, dtype=torch.int64, device=device)
        self._positions = torch.arange(max_tokens, dtype=torch.int64, device=device)
        self._armed = 0  # words from here on are at rest
        self._excluded: torch.Tensor | None = None  # of the words as they stand

    def arm(self, masks: torch.Tensor, query_start_loc: torch.Tensor, num_tokens: int) -> None:
        """Gives each token the mask of its request.

        `masks` [R] int64, in the order of the batch. `query_start_loc` [R+1]: where each request's
        tokens start, and where the last one's end; read on the device, since host copies may be
        upper bounds. `num_tokens`: rows of this step, padding included. Rows at or behind the last
        request's end are padding and get `public` only.
        Raises ValueError where the step has more rows than the buffer.
        """
        ends = query_start_loc[1:].to(torch.int64)
        row = torch.searchsorted(ends, self._positions[:num_tokens], right=True)
        padded = torch.cat([masks, masks.new_full((1,), PUBLIC_ONLY.signed)])
        self.arm_tokens(padded[row], num_tokens)

    def arm_tokens(self, words: torch.Tensor, num_tokens: int) -> None:
        """The same where each token's mask is known already: `words` [T], padding not among them.

        Raises ValueError where the step has more rows than the buffer.
        """
        if num_tokens > len(self.words):
            raise ValueError(f"{num_tokens} tokens scheduled, but masks for {len(self.words)}")
        self.words[: len(words)] = words
        self._close(len(words))

    def excluded(self, num_tokens: int, num_experts: int) -> torch.Tensor:
        """[T, E] bool, made of the words as they are: True where an expert may not be consulted.

        Made once a step, for all layers. Not on GPUs, where a replayed graph would see none of it.
        """
        kept = self._excluded
        if kept is None or kept.shape != (num_tokens, num_experts):
            kept = self._excluded = excluded_by(self.words[:num_tokens], num_experts)
        return kept

    def open_all(self, num_experts: int) -> None:
        """For profiling, which must run the work of every expert; `rest` must follow."""
        self._excluded = None
        self.words.fill_(ExpertSet.first(num_experts).signed)
        self._armed = len(self.words)

    def rest(self) -> None:
        """`public` only, everywhere."""
        self._close(0)

    def _close(self, start: int) -> None:
        self._excluded = None
        if self._armed > start:
            self.words[start : self._armed] = PUBLIC_ONLY.signed
        self._armed = start
