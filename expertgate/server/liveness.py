"""Whether the engine still answers, which its processes being there doesn't say."""

import asyncio
import contextlib
import time
from collections.abc import Callable

from expertgate.server.audit.writer import Recorded
from expertgate.server.grants import Grants
from expertgate.server.guard import GuardedLLM, UnavailableError
from expertgate.server.proof import one_token

_QUIET_S = 5.0
"""An engine from which nothing has come for so long is asked for a token, or for a word if busy."""
_LATE_S = 30.0
"""One that has given neither after so long is not ready."""


class Liveness:
    def __init__(
        self,
        engine: GuardedLLM,
        grants: Grants,
        recorded: Recorded,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`recorded`: how the audit log holds the probe that the server made of its engine."""
        self._engine = engine
        self._grants = grants
        self._recorded = recorded
        self._clock = clock
        self._heard_at = clock()
        self._heard = engine.heard

    @property
    def late(self) -> bool:
        """Nothing has come from the engine though it was asked."""
        return self._clock() - self._look() > _LATE_S

    async def watch(self) -> None:
        """Looks, and asks where nothing is heard, until it is cancelled."""
        asking: asyncio.Task[None] | None = None
        while True:
            quiet = self._clock() - self._look() >= _QUIET_S
            # A busy engine says enough, and one that doesn't answer need not be asked twice.
            if quiet and (asking is None or asking.done()):
                asking = asyncio.create_task(self._ask())
            await asyncio.sleep(_QUIET_S / 5)

    async def _ask(self) -> None:
        with contextlib.suppress(UnavailableError):  # which is said elsewhere
            if self._engine.busy:
                # A token would stand behind what runs, which may show nothing before its end.
                await self._engine.ask()
            else:
                await one_token(self._engine, self._grants, self._recorded)

    def _look(self) -> float:
        if self._engine.heard != self._heard:
            self._heard = self._engine.heard
            self._heard_at = self._clock()
        return self._heard_at
