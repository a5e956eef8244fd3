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
    """Of one principal, while it has calls here, waiting or not, or somebody else waits."""

    spent: int = 0
    """Tokens since somebody waits, or what it was lifted to."""
    calls: int = 0
    """Its calls here, those that wait among them."""
    waiting: "deque[_Turn]" = field(default_factory=deque)
    waiting_tokens: int = 0
    """Of the prompts in `waiting`."""


@dataclass(slots=True, eq=False)
class _Turn:
    account: _Account
    width: int
    """What it holds of the room while it runs."""
    tokens: int
    """Of its prompt."""
    progress: Progress | None
    come: asyncio.Future[None]
    """Done when it may run."""


def _had(account: _Account) -> tuple[int, int]:
    """Whoever has least goes next: of tokens, then of calls that run, whose tokens come later."""
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
        self.room = room
        self.most_tokens = most_tokens
        self.most_ahead = room if most_ahead is None else most_ahead
        # Dictionaries without values are sets that keep their order.
        self._running: dict[_Turn, None] = {}
        self._held = 0  # of the room, by what runs
        self._unbegun: dict[_Turn, None] = {}  # of what runs; some may have begun, unseen
        self._ahead = 0  # of the room, by these
        self._accounts: dict[str, _Account] = {}
        self._waiting: dict[_Account, None] = {}
        self._waiting_tokens = 0
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
        if width > self.room:
            raise VLLMValidationError(f"n is {width}; at most {self.room} can run at once")
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
        self._check_tokens(account, turn.tokens)
        if not account.waiting:
            least = min((other.spent for other in self._waiting), default=0)
            account.spent = max(account.spent, least)
            self._waiting[account] = None
        account.waiting.append(turn)
        account.waiting_tokens += turn.tokens
        self._waiting_tokens += turn.tokens
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
            account.waiting_tokens -= turn.tokens
            self._waiting_tokens -= turn.tokens
            WAITING.dec()

    def _check_tokens(self, account: _Account, tokens: int) -> None:
        """Raises MaxQueuedTokensError where no prompt of so many may wait as well."""
        if self.most_tokens is None:
            return
        free = self.most_tokens - self._waiting_tokens - tokens
        if self._waiting_tokens and account.waiting_tokens + tokens > free:
            raise MaxQueuedTokensError

    def _admit(self) -> None:
        """Lets those who wait go on, in their order, until one of them has to wait for room."""
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
        """Where none of its calls does any more; where nobody's does, all debts are forgotten."""
        if account.waiting:
            return
        del self._waiting[account]
        if not self._waiting:
            self._accounts = {who: each for who, each in self._accounts.items() if each.calls}
            for each in self._accounts.values():
                each.spent = 0

    def _fits(self, width: int) -> bool:
        """Whether so wide a call may run now, by the room and by what the engine has not begun."""
        if self._held + width > self.room:
            return False
        if self._ahead + width > self.most_ahead:
            for turn in [t for t in self._unbegun if t.progress is None or t.progress.begun()]:
                self._begun(turn)
        return not self._ahead or self._ahead + width <= self.most_ahead

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
