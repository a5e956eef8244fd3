"""A file of the operator's that is read again when it changes."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2

T = TypeVar("T")


class WatchedFile(Generic[T]):
    """What a file says. A broken one, or one that is gone, leaves in force what it said before.

    It is looked at whenever it is asked for, but at most every fifth of a second.
    """

    def __init__(self, path: Path, parse: Callable[[bytes, Path], T]) -> None:
        """`parse` raises ValueError. Raises what it does, and OSError."""
        self.path = path
        self._parse = parse
        self._looked = time.monotonic()
        self._stamp = stamp(path)
        self._fault = ""
        self._changes = 0
        self._value = parse(path.read_bytes(), path)

    def get(self) -> T:
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            self.refresh()
        return self._value

    def refresh(self) -> int:
        """Looks at the file now; how often something else has come into force since the start."""
        self._looked = time.monotonic()
        # Before it is read: what is written meanwhile changes the stamp once more.
        found = stamp(self.path)
        if found == self._stamp:
            self._fault = ""
            return self._changes
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            # The stamp stays the old one: what can't be read now is tried at the next look.
            self._failed(f"{self.path}: {error.strerror or error}")
            return self._changes
        self._stamp = found
        try:
            self._value = self._parse(raw, self.path)
        except ValueError as error:
            self._failed(str(error).replace("\n", "; "))
            return self._changes
        self._fault = ""
        self._changes += 1
        log.info("%s: changed, read again and in force", self.path)
        return self._changes

    def _failed(self, fault: str) -> None:
        """Says it once for each change of the fault, not at every look."""
        if fault != self._fault:
            log.error("what was read before stays in force: %s", fault)
        self._fault = fault


def stamp(path: Path) -> tuple[int, int, int, int] | None:
    """Differs after every change of a file, or of where a link leads; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    # The time of a change as well: of its mode, or by someone who set the other time back.
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
