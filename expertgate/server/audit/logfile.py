"""The newest file of a log, held open: what others do to it meanwhile shows before a write."""

import contextlib
import os
from pathlib import Path

from expertgate.server.audit.chain import digest
from expertgate.server.audit.folder import name_of
from expertgate.server.audit.signing import sync_folder

_READ_BYTES = 1 << 16


class LogFile:
    """Opened with the first write, and again after one that failed."""

    def __init__(self, folder: Path, path: Path | None, size: int) -> None:
        """`path`: the file in which the log ends after `size` bytes; None where it has none yet."""
        self._folder = folder
        self._path = path
        self.size = size
        """Bytes that are known to be on disk; what stands behind them is cut off."""
        self._file: int | None = None
        self._identity = (0, 0)  # of that file; while it is open no other can have the same

    def write(self, data: bytes, seq: int, last: str) -> None:
        """Returns once `data` is on disk. Raises OSError and TamperedError; then none of it counts.

        `seq`: of the first record in `data`. `last`: the hash of the one before it.
        """
        if self._file is None:
            self._open(seq, last)
        assert self._path is not None
        assert self._file is not None
        self._check(self._path)
        left = memoryview(data)
        while left:
            left = left[os.write(self._file, left) :]
        self.size += len(data)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None

    def finish(self) -> None:
        """The next record begins another file."""
        self.close()
        self._path, self.size = None, 0

    def _open(self, seq: int, last: str) -> None:
        """Cut back to what is known to be on disk."""
        path = self._path
        fresh = path is None
        if path is None:
            path = self._folder / name_of(seq)
        elif not path.exists():
            raise TamperedError(f"{path} is gone")
        # Each write returns when it is on disk. A second call for that would wait for the
        # interpreter's lock once more, which a busy server holds for milliseconds at a time.
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_DSYNC, 0o600)
        try:
            found = os.fstat(file)
            if found.st_size < self.size:
                raise TamperedError(f"{path} was cut by someone else")
            if not self._ends_with(last, path):
                raise TamperedError(f"{path} was replaced by someone else")
            os.ftruncate(file, self.size)
            os.fsync(file)
            if fresh:
                sync_folder(self._folder)
        except BaseException:
            os.close(file)
            raise
        self._path, self._file, self._identity = path, file, _identity(found)

    def _ends_with(self, last: str, path: Path) -> bool:
        """Whether the last record up to where we were is the one that we wrote."""
        if not self.size:
            return True
        line, start = b"", self.size - 1  # without its end
        with path.open("rb") as file:
            while start and b"\n" not in line:
                end, start = start, max(0, start - _READ_BYTES)
                file.seek(start)
                line = file.read(end - start) + line
        return digest(line.rpartition(b"\n")[2]) == last

    def _check(self, path: Path) -> None:
        """Whether what is open is still the log, and as we left it."""
        try:
            there = path.stat()
        except FileNotFoundError:
            raise TamperedError(f"{path} is gone") from None
        if _identity(there) != self._identity:
            raise TamperedError(f"{path} was replaced by someone else")
        if there.st_size != self.size:
            raise TamperedError(f"{path} was written to by someone else")


class TamperedError(Exception):
    """The file isn't as this process left it."""


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
