"""From the times of tokens to figures, and from the figures of several rounds to ratios."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Figures:
    """One workload through one contender. Times in ms, memory and weights in GB (10⁹)."""

    tokens_per_s: float
    requests_per_s: float
    ttft_ms: Mapping[str, float]
    inter_token_ms: Mapping[str, float]
    peak_memory_gb: float
    weights_gb: float

    @property
    def tokens_per_s_per_gb(self) -> float:
        return self.tokens_per_s / self.weights_gb

    @classmethod
    def of(cls, read: Mapping[str, Any]) -> "Figures":
        """What `as_json` made."""
        return cls(**{field.name: read[field.name] for field in fields(cls)})

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_s_per_gb": self.tokens_per_s_per_gb}


def figures(times: Sequence[Sequence[float]], peak_bytes: int, weight_bytes: int) -> Figures:
    """`times`: for each request its start, then when each of its tokens came, in seconds."""
    seconds = max(each[-1] for each in times) - min(each[0] for each in times)
    tokens = sum(len(each) - 1 for each in times)
    gaps = [later - sooner for each in times for sooner, later in pairwise(each[1:])]
    return Figures(
        tokens_per_s=tokens / seconds,
        requests_per_s=len(times) / seconds,
        ttft_ms=_percentiles(each[1] - each[0] for each in times),
        inter_token_ms=_percentiles(gaps),
        peak_memory_gb=peak_bytes / 1e9,
        weights_gb=weight_bytes / 1e9,
    )


def middle(runs: Sequence[Figures]) -> Figures:
    """Of several runs of the same: the median of each figure, and the highest peak of memory.

    The first is left out, being cold, where there are others.
    """
    runs = runs[1:] or runs

    def percentiles(of: Callable[[Figures], Mapping[str, float]]) -> dict[str, float]:
        return {key: statistics.median(of(run)[key] for run in runs) for key in of(runs[0])}

    return Figures(
        tokens_per_s=statistics.median(run.tokens_per_s for run in runs),
        requests_per_s=statistics.median(run.requests_per_s for run in runs),
        ttft_ms=percentiles(lambda run: run.ttft_ms),
        inter_token_ms=percentiles(lambda run: run.inter_token_ms),
        peak_memory_gb=max(run.peak_memory_gb for run in runs),
        weights_gb=runs[0].weights_gb,
    )


def _percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """Nearest rank."""
    ordered = sorted(seconds)
    return {f"p{p}": 1000 * ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES}


@dataclass(frozen=True)
class Ratio:
    """Ours to a peer's of the same round."""

    peer: str
    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


def ratio(
    ours: Sequence[float], peers: Mapping[str, Sequence[float]], *, least: bool = False
) -> Ratio | None:
    """To the best peer: the one with the highest median, or the `least`. None where no peer ran.

    Each list has a figure for each round; rounds are compared with themselves.
    """
    if not peers:
        return None
    choose = min if least else max
    best = choose(peers, key=lambda name: statistics.median(peers[name]))
    ratios = [mine / theirs for mine, theirs in zip(ours, peers[best], strict=True)]
    return Ratio(best, statistics.median(ratios), min(ratios), max(ratios))
