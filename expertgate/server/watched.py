"""A file of the operator's that is read again when it changes."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from expertgate.server.beside import beside
from expertgate.server.plain_file import check_plain

log = logging.getLogger(__name__)

T = TypeVar("T")


class WatchedFile(Generic[T]):
    """What a file says. A broken one, or one that is gone, leaves in force what it said before."""

    def __init__(self, path: Path, parse: Callable[[bytes, Path], T]) -> None:
        """`parse` raises ValueError. Raises what it does, and OSError."""
        self.path = path
        self._parse = parse
        self._stamp = self._seen = stamp(path)
        self._fault = ""
        self.value = self._read()

    async def refresh(self) -> bool:
        """Looks at the file; True where something else has come into force by that.

        What is still being written waits for another look. Between the change of `value` and the
        return nothing is awaited. Only one may look at a time.
        """
        found = stamp(self.path)
        settled, self._seen = found == self._seen, found
        if found == self._stamp:
            self._fault = ""
            return False
        if not settled:
            return False
        try:
            # Thousands of keys take a second to read, and streams would wait.
            value = await beside(self._read, "file")
        except ValueError as error:
            self._stamp = found
            self._failed(str(error).replace("\n", "; "))
            return False
        except Exception as error:  # also of a kind that nobody thought of
            # The stamp stays the old one: what can't be read now is tried at the next look.
            words = error.strerror if isinstance(error, OSError) else repr(error)
            self._failed(f"{self.path}: {words or error}")
            return False
        if stamp(self.path) != found:
            return False  # what was read may be half of each
        self._stamp, self._fault, self.value = found, "", value
        log.info("%s: changed, read again and in force", self.path)
        return True

    def _read(self) -> T:
        check_plain(self.path)
        return self._parse(self.path.read_bytes(), self.path)

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
