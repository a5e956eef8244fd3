"""The command `expertgate`."""

import signal
import sys
from typing import Any


def main() -> Any:
    """As `expertgate.server.cli.main`, which Ctrl-C would leave with a traceback while it loads."""
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:  # nothing has begun that would have to be ended
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from expertgate.server import cli

    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
