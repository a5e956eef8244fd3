"""What a request made each expert do, as totals; the counting is `expertgate.model.ledger`.

Dimensions: E experts. Routing by token would give the text away, so it never leaves a worker.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

WEIGHT_UNIT = 1 << 32
"""Routing weights are summed as integers of 1/WEIGHT_UNIT, so that no order changes a total."""


@dataclass(frozen=True, slots=True)
class Work:
    """What workers counted, over all choices of an engine call or all calls of a request.

    `computed` tokens went through the layers, each position of each choice counted once, however
    often a preemption made the engine repeat it. `cached` tokens came from the prefix cache and
    were routed by nobody. `slots` [E]: how often the router sent a token to this expert, counted
    in each of the `layers`. `weights` [E]: the routing weights of these slots, summed, in
    1/WEIGHT_UNIT.
    """

    layers: int
    computed: int
    cached: int
    slots: tuple[int, ...]
    weights: tuple[int, ...]

    @classmethod
    def over_ranks(cls, reports: Sequence["Work"]) -> "Work":
        """The work of one call from that of the pipeline's ranks; each has its own layers."""
        return cls(
            layers=sum(report.layers for report in reports),
            computed=reports[0].computed,
            cached=reports[0].cached,
            slots=tuple(map(sum, zip(*(report.slots for report in reports), strict=True))),
            weights=tuple(map(sum, zip(*(report.weights for report in reports), strict=True))),
        )

    def __add__(self, other: "Work") -> "Work":
        """The work of two calls to the same model."""
        return Work(
            layers=self.layers,
            computed=self.computed + other.computed,
            cached=self.cached + other.cached,
            slots=tuple(map(add, self.slots, other.slots)),
            weights=tuple(map(add, self.weights, other.weights)),
        )

    def tokens(self, expert: int) -> float:
        """How many of the computed tokens went to this expert, as the mean over the layers."""
        return self.slots[expert] / self.layers

    def share(self, expert: int) -> float:
        """This expert's part, 0 to 1, of all routing weight; 0 where nothing was computed."""
        total = sum(self.weights)
        return self.weights[expert] / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """The work of a request's engine calls, and its tokens as OpenAI's `usage` counts them.

    `prompt_tokens` counts each prompt once, whatever `n` is; `completion_tokens` all choices.
    """

    prompt_tokens: int
    completion_tokens: int
    work: Work

    def __add__(self, other: "Usage") -> "Usage":
        """The usage of two calls to the same model."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.work + other.work,
        )
