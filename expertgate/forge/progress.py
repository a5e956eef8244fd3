"""A line on the terminal every so many steps."""

from time import monotonic

_EVERY = 50


class Printer:
    """Prints the mean of each loss over the last 50 steps."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = monotonic()
        self._steps = 0
        self._sums: dict[str, float] = {}

    def __call__(self, losses: dict[str, float]) -> None:
        self._steps += 1
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss
        if self._steps % _EVERY == 0:
            means = "  ".join(f"{name} {total / _EVERY:.4f}" for name, total in self._sums.items())
            print(
                f"{self._what:20} step {self._steps:5}  {means}  {monotonic() - self._start:.0f} s",
                flush=True,
            )
            self._sums.clear()
