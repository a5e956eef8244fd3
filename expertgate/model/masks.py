"""Which experts each token of the running batch may consult: one buffer, filled by both runners.

Dimensions: T tokens of a step, R requests of a step.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from expertgate.policies.expert_set import MAX_EXPERTS, PUBLIC_ONLY, ExpertSet

IntArray = np.ndarray[Any, np.dtype[np.int64]]

EXTRA_ARG = "expertgate_mask"
"""The key of `SamplingParams.extra_args` under which the guarded engine writes a request's mask."""


def requested(extra_args: Mapping[str, Any] | None) -> ExpertSet:
    """The expert set that the guarded engine wrote; `public` alone where it wrote none.

    Anything but a mask of 64 bits counts as none: what can't be understood opens nothing.
    """
    mask = (extra_args or {}).get(EXTRA_ARG)
    if type(mask) is not int or not 0 <= mask < 1 << MAX_EXPERTS:
        return PUBLIC_ONLY
    return _expert_set(mask)


# Asked of each request in each step, on CPUs.
_expert_set = functools.lru_cache(maxsize=1024)(ExpertSet)


class TokenMasks:
    """A persistent int64 word for each scheduled token, on the device, read by every MoE layer.

    It has one address for the life of the process, because a replayed CUDA graph reads what stood
    at that address when it was captured. At rest every word says `public` only; `arm` opens what
    the requests of one real step may consult, and `rest` closes it again.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.words = torch.full((max_tokens,), PUBLIC_ONLY.signed, dtype=torch.int64, device=device)
        self._positions = torch.arange(max_tokens, dtype=torch.int64, device=device)
        # The same memory. What PyTorch takes to write a few words is seen in a small model's steps.
        self._written: Any = self.words.numpy() if device.type == "cpu" else self.words
        self._armed = 0  # words from here on are at rest

    @property
    def count(self) -> int:
        """How many rows of the step are tokens; those behind them are padding."""
        return self._armed

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

    def arm_tokens(self, words: torch.Tensor | IntArray, num_tokens: int) -> None:
        """The same where each token's mask is known already: `words` [T], padding not among them.

        Raises ValueError where the step has more rows than the buffer.
        """
        if num_tokens > len(self.words):
            raise ValueError(f"{num_tokens} tokens scheduled, but masks for {len(self.words)}")
        self._written[: len(words)] = words
        self._close(len(words))

    def open_all(self, num_experts: int) -> None:
        """For profiling, which must run the work of every expert; `rest` must follow."""
        self.words.fill_(ExpertSet.first(num_experts).signed)
        self._armed = len(self.words)

    def rest(self) -> None:
        """`public` only, everywhere."""
        self._close(0)

    def _close(self, start: int) -> None:
        if self._armed > start:
            self._written[start : self._armed] = PUBLIC_ONLY.signed
        self._armed = start
