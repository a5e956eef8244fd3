"""A request's one prompt is rendered in the request's own task.

vLLM gathers the steps of rendering over all prompts of a request, each step in tasks of its own. A
gather of one costs three turns of the event loop, and a turn is as long as all streams take that
have a token just then: with 128 of them the first token came half as late again.
"""

import asyncio
from collections.abc import Awaitable
from types import ModuleType
from typing import Any

from vllm.renderers import base


async def gather(*works: Awaitable[Any]) -> list[Any]:
    """`asyncio.gather`, but one work alone runs where it is waited for."""
    if len(works) != 1:
        return list(await asyncio.gather(*works))
    result = await works[0]
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        # Before Python 3.12 `wait_for`, in which templates are rendered, may take a result that is
        # just there for an answer to being cancelled; `asyncio.gather` doesn't.
        raise asyncio.CancelledError
    return [result]


class _Asyncio(ModuleType):
    """The module, as `vllm.renderers.base` sees it."""

    gather = staticmethod(gather)

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)


def render_in_place() -> None:
    """From now on, in this process."""
    base.asyncio = _Asyncio("asyncio")
