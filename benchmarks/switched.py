"""`expertgate serve` whose audit log signals take away and give back, for `benchmarks.audit`.

Without its log the server is one of `audit: {enabled: false}`: nothing is recorded, nothing waits
for the disk, and no receipt is kept. Each request is wholly with or without it.
"""

import signal
import sys
from collections.abc import Callable
from typing import Any

from expertgate.model.catalogue import Catalogue
from expertgate.server.audit.receipts import Receipts
from expertgate.server.audit.trail import Trail
from expertgate.server.audit.writer import AuditLog

ON, OFF = signal.SIGUSR1, signal.SIGUSR2


def make_switchable(make: Callable[..., None]) -> Callable[..., None]:
    """`make`: the trail's `__init__`. A server makes one trail."""

    def made(self: Trail, audit_log: AuditLog | None, catalogue: Catalogue, **options: Any) -> None:
        make(self, audit_log, catalogue, **options)
        receipts = self.receipts

        def switch(log: AuditLog | None, receipts: Receipts | None) -> None:
            self.log, self.receipts = log, receipts

        signal.signal(ON, lambda *_: switch(audit_log, receipts))
        signal.signal(OFF, lambda *_: switch(None, None))

    return made


if __name__ == "__main__":
    from expertgate.server.cli import main

    Trail.__init__ = make_switchable(Trail.__init__)  # type: ignore[method-assign]
    sys.exit(main())
