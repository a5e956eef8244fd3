"""`python -m tests.server.audit.filled FOLDER`: fills the disk that FOLDER is on, and empties it.

Prints what the log said while it was full; the log is then one that went on by itself.
"""

import asyncio
import sys
import time
from pathlib import Path

from expertgate.server.audit.writer import AuditUnavailable
from tests.server.audit.logs import open_log


def main(folder: Path) -> None:
    ballast = folder / "ballast"
    ballast.write_bytes(b"x" * 50_000)
    log = open_log(folder)
    try:
        for number in range(100_000):
            asyncio.run(log.append("request", request=f"r{number}"))
    except AuditUnavailable as error:
        print(number, error)
    ballast.unlink()
    while not log.healthy:
        time.sleep(0.05)
    asyncio.run(log.append("request", request="after"))
    log.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
