"""Waits for what another thread brings, for one turn of the event loop less than asyncio does.

`asyncio.wrap_future` hands a result to the loop, which wakes the task in its next turn. Where every
stream has a token a turn is as long as all of them take, and each request waits for its record.
"""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future
from contextvars import Context
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Landing(Generic[T]):
    """Awaited once, by a task. Cancelling that task cancels `future`, unless it is done or runs.

    To a task this is a future (`asyncio.isfuture`): it asks for `get_loop` and
    `add_done_callback`, then for `result` when called back, and for `cancel` when cancelled.
    """

    _asyncio_future_blocking = False

    def __init__(self, future: Future[T]) -> None:
        self._future = future
        self._loop = asyncio.get_running_loop()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(
        self, wake: Callable[["Landing[T]"], object], *, context: Context
    ) -> None:
        def landed(_: Future[T]) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(wake, self, context=context)

        self._future.add_done_callback(landed)

    def cancel(self, msg: object = None) -> bool:
        """Whether the task will be woken by this."""
        del msg
        return self._future.cancel()

    def result(self) -> T:
        try:
            return self._future.result(timeout=0)
        except CancelledError:
            raise asyncio.CancelledError from None

    def __await__(self) -> Generator[Any, None, T]:
        if not self._future.done():
            self._asyncio_future_blocking = True
            yield self
        return self.result()
