"""Runs beside the event loop what may take long, each call in a thread of its own.

The loop's own threads are few, and the process doesn't end before they have.
"""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")

ANSWER = "answer"
"""The name of threads that make so many objects that the process can't end while they do."""


class Lane:
    """One call at a time beside the event loop, in the order in which they came.

    Threads share one lock of the interpreter's: several are no faster, and each more of them makes
    the event loop wait longer for its turn.
    """

    def __init__(self) -> None:
        self._free = asyncio.Lock()

    async def run(self, call: Callable[[], T], name: str) -> T:
        """What `call` returns or raises. The next begins when it is done, waited for or not."""
        await self._free.acquire()
        try:
            future = beside(call, name)
        except BaseException:  # there may be no more threads just then
            self._free.release()
            raise
        future.add_done_callback(lambda _: self._free.release())
        return await asyncio.shield(future)


def beside(call: Callable[[], T], name: str) -> asyncio.Future[T]:
    """What `call` returns or raises. Nobody waits for it at the end of the process.

    Raises RuntimeError where no more threads can be had.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def work() -> None:
        try:
            found: tuple[T | None, BaseException | None] = call(), None
        except StopIteration as raised:  # which no future takes
            found = None, RuntimeError(f"{name}: {raised!r}")
        except BaseException as raised:
            found = None, raised
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, *found)

    # In the context of whoever waits: log lines are about the same request.
    threading.Thread(target=copy_context().run, args=(work,), name=name, daemon=True).start()
    return future


def leave() -> None:
    """Ends the process, successfully, where a thread still puts together what nobody awaits.

    Python takes a thread's turn from it at its own end, which pydantic's core doesn't survive: the
    process would end by SIGABRT. To be called when all else is closed.
    """
    if any(thread.name == ANSWER for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
