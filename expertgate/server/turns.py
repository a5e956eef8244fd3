"""Whose turn it is, where more is asked than can run at once: those who had least go first.

The engine serves its queue in order of arrival, so whoever fills it makes all others wait. Hence
it gets no more than keeps it busy, and the rest waits here. While somebody waits, the tokens of
each principal are counted, read and written, and whoever has had the fewest goes next. Who begins
to wait is lifted to the least of those who do already, so that an absence saves nothing up; who
leaves and comes back has had what it had (virtual token counters: Sheng et al., Fairness in
Serving Large Language Models, OSDI 2024). What was had while nobody waited is nobody's debt.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from vllm.exceptions import MaxQueuedTokensError, VLLMValidationError

from expertgate.server.metrics import WAITING

_LOOK_S = 0.05
"""While somebody waits, how often the turns are looked through for those that need none any more:
not each of them tells when it has begun, or is over."""


class Progress(Protocol):
    """How far the engine is with a call, which its outputs don't always say."""

    def begun(self) -> bool:
        """It has read the prompt."""

    def over(self) -> bool:
        """It is done, though the client may not have read what is ready."""


@dataclass(slots=True, eq=False)
class _Account:
    """Of one principal, while it has calls here, `waiting` or not, or somebody else waits.

    `spent`: tokens since somebody waits, or what it was lifted to. `tokens`: of what waits.
    """

    spent: int = 0
    calls: int = 0
    tokens: int = 0
    waiting: "deque[_Turn]" = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _Turn:
    """`width`: what it holds of the room while it runs. `come`: done when it may run."""

    account: _Account
    width: int
    tokens: int
    progress: Progress | None
    come: asyncio.Future[None]


def _had(account: _Account) -> tuple[int, int]:
    """Tokens; and for whoever has just come, what runs: its tokens are not known yet."""
    return account.spent, account.calls - len(account.waiting)


class Turns:
    """Lets calls run while there is `room`, each as wide as its choices; the others wait.

    One that is too wide for what is left is waited for, or narrow ones would pass it for ever.
    `most_tokens`: of the prompts that wait, those of all principals together; each may have as many
    as are left for others, half where it is alone, and a first one any number. `most_ahead`: how
    much of the room those may hold that the engine has not begun, which stand in its queue.
    """

    def __init__(
        self, room: int, most_tokens: int | None = None, most_ahead: int | None = None
    ) -> None:
        self._room = room
        self._most_tokens = most_tokens
        self._most_ahead = room if most_ahead is None else most_ahead
        self._running: dict[_Turn, None] = {}
        self._held = 0
        self._unbegun: dict[_Turn, None] = {}  # of those that run; some may have, unseen
        self._ahead = 0
        self._accounts: dict[str, _Account] = {}
        self._waiting: dict[_Account, None] = {}
        self._tokens = 0
        self._look: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return sum(len(account.waiting) for account in self._waiting)

    @asynccontextmanager
    async def turn(
        self, principal: str, width: int, tokens: int, progress: Progress | None = None
    ) -> AsyncGenerator[None, None]:
        """Waits for a turn, and holds `width` of the room while it lasts.

        Or until it is over by its `progress`, as a call is that the engine is done with and whose
        client doesn't read what is ready: then whoever waits gets the room.

        Raises VLLMValidationError for what could never run, and MaxQueuedTokensError where the
        prompts that wait leave it no place to wait in.
        """
        if width > self._room:
            raise VLLMValidationError(f"n is {width}; at most {self._room} can run at once")
        account = self._accounts.setdefault(principal, _Account())
        account.calls += 1
        come = asyncio.get_running_loop().create_future()
        turn = _Turn(account, width, tokens, progress, come)
        try:
            if self._waiting or not self._fits(width):
                await self._wait(turn)
            else:
                self._start(turn)
            yield
        finally:
            self._end(turn)
            self._admit()
            account.calls -= 1
            if not account.calls and not self._waiting:
                del self._accounts[principal]

    def spend(self, principal: str, tokens: int) -> None:
        """Tokens read or written for a call."""
        account = self._accounts.get(principal)
        if account is not None and self._waiting:
            account.spent += tokens

    async def _wait(self, turn: _Turn) -> None:
        account = turn.account
        self._check(account, turn.tokens)
        if not account.waiting:
            least = min((other.spent for other in self._waiting), default=0)
            account.spent = max(account.spent, least)
            self._waiting[account] = None
        account.waiting.append(turn)
        account.tokens += turn.tokens
        self._tokens += turn.tokens
        WAITING.inc()
        self._look_later()
        try:
            await turn.come
        except BaseException:
            with suppress(ValueError):  # its turn came as it was called off, or it was passed over
                account.waiting.remove(turn)
                self._waits_no_more(account)
            raise
        finally:
            account.tokens -= turn.tokens
            self._tokens -= turn.tokens
            WAITING.dec()

    def _check(self, account: _Account, tokens: int) -> None:
        if self._most_tokens is None:
            return
        free = self._most_tokens - self._tokens - tokens
        if self._tokens and account.tokens + tokens > free:
            raise MaxQueuedTokensError

    def _admit(self) -> None:
        while self._waiting:
            account = min(self._waiting, key=_had)
            turn = account.waiting[0]
            if not turn.come.done():
                if not self._fits(turn.width):
                    return
                self._start(turn)
                turn.come.set_result(None)
            account.waiting.popleft()
            self._waits_no_more(account)

    def _waits_no_more(self, account: _Account) -> None:
        if account.waiting:
            return
        del self._waiting[account]
        if not self._waiting:
            self._accounts = {who: each for who, each in self._accounts.items() if each.calls}
            for each in self._accounts.values():
                each.spent = 0

    def _fits(self, width: int) -> bool:
        if self._held + width > self._room:
            return False
        if self._ahead + width > self._most_ahead:
            for turn in [t for t in self._unbegun if t.progress is None or t.progress.begun()]:
                self._begun(turn)
        return not self._ahead or self._ahead + width <= self._most_ahead

    def _start(self, turn: _Turn) -> None:
        self._running[turn] = self._unbegun[turn] = None
        self._held += turn.width
        self._ahead += turn.width
        turn.account.spent += turn.tokens if self._waiting else 0

    def _begun(self, turn: _Turn) -> None:
        if turn in self._unbegun:
            del self._unbegun[turn]
            self._ahead -= turn.width

    def _end(self, turn: _Turn) -> None:
        self._begun(turn)
        if turn in self._running:
            del self._running[turn]
            self._held -= turn.width

    def _look_later(self) -> None:
        if self._look is None:
            loop = asyncio.get_running_loop()
            self._look = loop.call_later(_LOOK_S, self._look_through)

    def _look_through(self) -> None:
        self._look = None
        for turn in [t for t in self._running if t.progress is not None and t.progress.over()]:
            self._end(turn)
        self._admit()
        if self._waiting:
            self._look_later()
