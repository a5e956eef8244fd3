"""Files of the operator's that are read again and again, as long as the server runs."""

import errno
import stat
from pathlib import Path

MAX_BYTES = 1 << 24
"""More than any of them needs, and little enough to be read while requests wait."""


def check_plain(path: Path) -> None:
    """Raises OSError for what can't be read to its end at once, and twice.

    Whoever opens a pipe waits for somebody who writes: for ever, perhaps, and with everybody who
    waits for what the file says now.
    """
    found = path.stat()
    # Of a folder the system's own words are better.
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        words = "must be a file, and is a pipe, a socket or a device"
        raise OSError(errno.EINVAL, words, str(path))
    if found.st_size > MAX_BYTES:
        words = f"has {found.st_size} bytes, and must have at most {MAX_BYTES}"
        raise OSError(errno.EFBIG, words, str(path))
