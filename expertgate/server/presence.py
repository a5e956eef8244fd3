"""Whether a client is still there, while its answer is made or told."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.types import Receive


class ClientGone(Exception):  # noqa: N818  (what it is)
    """The client has left before its answer was whole."""


@asynccontextmanager
async def while_there(receive: Receive) -> AsyncGenerator[None, None]:
    """Ends what is inside as soon as the client leaves, whatever it waits for.

    The body must have been read: what `receive` gives next can then only be that.

    Raises ClientGone in place of anything that was raised inside once the client had left, and
    CancelledError where the task was called off from outside: vLLM makes errors and answers of its
    own of both.
    """
    task = asyncio.current_task()
    assert task is not None
    called_off = task.cancelling()
    # What is inside stays in its own task. Between two tasks each result takes a turn of the loop
    # or two, and where every stream is busy a turn is what all of their tokens take.
    try:
        async with asyncio.timeout(None) as limit:
            watching = asyncio.create_task(_watch(receive, limit))
            try:
                yield
            finally:
                watching.cancel()
    except Exception:
        if task.cancelling() > called_off:
            raise asyncio.CancelledError from None
        if not limit.expired():
            raise
        raise ClientGone from None
    if task.cancelling() > called_off:
        raise asyncio.CancelledError


async def _watch(receive: Receive, limit: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    limit.reschedule(0)
