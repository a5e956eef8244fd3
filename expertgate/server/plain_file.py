"""Files of the operator's that are read again and again, as long as the server runs."""

import errno
import stat
from pathlib import Path


def check_plain(path: Path) -> None:
    """Raises OSError for what can't be read to its end at once, and twice.

    Whoever opens a pipe waits for somebody who writes: for ever, perhaps, and with everybody who
    waits for what the file says now.
    """
    mode = path.stat().st_mode
    # Of a folder the system's own words are better.
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        words = "must be a file, and is a pipe, a socket or a device"
        raise OSError(errno.EINVAL, words, str(path))
