"""Changes to a file that others read meanwhile: they see the old one or the new one."""

import fcntl
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Generator[Path, None, None]:
    """The file that `path` stands for, links followed, while no other edit of it can run.

    Raises OSError.
    """
    # Not by `Path.resolve`, which has an error of its own for a link that leads to itself.
    target = Path(os.path.realpath(path))
    # The file is replaced by a new one, so it is its folder that is locked.
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield target
        os.fsync(folder)
    finally:
        os.close(folder)


def replace(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Puts a new file, which is on disk, in place of an old one. `mode` is for the first.

    Raises OSError, and has then changed nothing.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            if path.exists():  # else a server of another user's could no longer read it
                old = path.stat()
                os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, old.st_mode & 0o7777)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
