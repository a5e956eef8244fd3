"""Waits for what another process or thread does, however slow the machine is."""

import time
from collections.abc import Callable

PATIENCE_S = 300


def until(holds: Callable[[], object], what: object = "what was waited for did not come") -> None:
    """Returns once `holds` does. Raises AssertionError with `what` where it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
