"""Whose turn it is, where more is asked than can run at once: those who had least go first.

The engine serves its queue in order of arrival, so whoever fills it makes all others wait. Hence
it gets no more than keeps it busy, and the rest waits here. Each principal's tokens are counted,
read and written, and whoever has had the fewest goes next; who comes anew begins at the least of
those who are there, so that an absence saves nothing up (virtual token counters: Sheng et al.,
Fairness in Serving Large Language Models, OSDI 2024).
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from vllm.exceptions import MaxQueuedTokensError, VLLMValidationError

from expertgate.server.metrics import WAITING

_LOOK_S = 1.0
"""How often those who wait look whether those who run still need their turn."""


@dataclass(slots=True, eq=False)
class _Turn:
    """`width`: what it holds of the room. `over`: whether nothing runs in it any more."""

    width: int
    over: Callable[[], bool]


@dataclass(slots=True, eq=False)
class _Account:
    """`spent`: tokens, in all, and what it was lifted by when it came. `calls`: run or wait."""

    spent: int
    calls: int = 0
    waiting: "deque[tuple[int, asyncio.Future[None]]]" = field(default_factory=deque)


def _had(account: _Account) -> tuple[int, int]:
    """Tokens; and for whoever has just come, what runs: its tokens are not known yet."""
    return account.spent, account.calls - len(account.waiting)


class Turns:
    """Lets calls run while there is `room`, each as wide as its choices; the others wait.

    One that is too wide for what is left is waited for, or narrow ones would pass it for ever.
    `most_tokens`: of the prompts that wait, those of all principals together.
    """

    def __init__(self, room: int, most_tokens: int | None = None) -> None:
        self._room = room
        self._most_tokens = most_tokens
        self._running = 0
        self._turns: set[_Turn] = set()
        self._tokens = 0
        self._accounts: dict[str, _Account] = {}

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return sum(len(account.waiting) for account in self._accounts.values())

    @asynccontextmanager
    async def turn(
        self,
        principal: str,
        width: int,
        tokens: int,
        over: Callable[[], bool] = lambda: False,
    ) -> AsyncGenerator[None, None]:
        """Waits for a turn, and holds `width` of the room while it lasts.

        Or until it is `over`, as a call is that the engine is done with and whose client doesn't
        read what is ready: then whoever waits gets the room.

        Raises VLLMValidationError for what could never run, or never wait, and
        MaxQueuedTokensError where the prompts of others leave it no place to wait in.
        """
        if width > self._room:
            raise VLLMValidationError(f"n is {width}; at most {self._room} can run at once")
        account = self._come(principal)
        try:
            await self._wait(account, width, tokens)
            self.spend(principal, tokens)
            turn = _Turn(width, over)
            self._turns.add(turn)
            try:
                yield
            finally:
                self._end(turn)
                self._admit()
        finally:
            account.calls -= 1
            if not account.calls:
                del self._accounts[principal]

    def spend(self, principal: str, tokens: int) -> None:
        """Tokens read or written for a call that runs."""
        self._accounts[principal].spent += tokens

    def _come(self, principal: str) -> _Account:
        account = self._accounts.get(principal)
        if account is None:
            least = min((other.spent for other in self._accounts.values()), default=0)
            account = self._accounts[principal] = _Account(least)
        account.calls += 1
        return account

    async def _wait(self, account: _Account, width: int, tokens: int) -> None:
        if self._running + width <= self._room and not self.waiting:
            self._running += width
            return
        if self._most_tokens is not None:
            if tokens > self._most_tokens:
                raise VLLMValidationError(
                    f"the prompt has {tokens} tokens; at most {self._most_tokens} may wait"
                )
            if self._tokens + tokens > self._most_tokens:
                raise MaxQueuedTokensError
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        account.waiting.append((width, mine))
        self._tokens += tokens
        WAITING.inc()
        try:
            while not (await asyncio.wait({mine}, timeout=_LOOK_S))[0]:
                for turn in [turn for turn in self._turns if turn.over()]:
                    self._end(turn)
                self._admit()
        except BaseException:
            if mine.done() and not mine.cancelled():  # its turn came as it was called off
                self._running -= width
                self._admit()
            else:
                with suppress(ValueError):  # passed over already
                    account.waiting.remove((width, mine))
                self._admit()  # it may have stood before one that is narrower
            raise
        finally:
            self._tokens -= tokens
            WAITING.dec()

    def _end(self, turn: _Turn) -> None:
        if turn in self._turns:
            self._turns.remove(turn)
            self._running -= turn.width

    def _admit(self) -> None:
        while waiting := [account for account in self._accounts.values() if account.waiting]:
            queue = min(waiting, key=_had).waiting
            width, future = queue[0]
            if not future.done():
                if self._running + width > self._room:
                    return
                self._running += width
                future.set_result(None)
            queue.popleft()
