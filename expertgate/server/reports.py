"""Asks the workers what they counted for engine calls that have ended."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from expertgate.model.usage import Work


class Reports:
    """One question at a time, for all calls that have ended by then.

    A question waits for the step that runs, and the engine for its answer; so under load many calls
    share one, and there is never more than one in a step.
    """

    def __init__(self, ask: Callable[[list[str]], Awaitable[Sequence[Any]]]) -> None:
        """`ask` takes accounts to every worker, as `ReportsUsage` understands them."""
        self._ask = ask
        self._waiting: dict[str, asyncio.Future[Work]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def of(self, account: str) -> Work:
        """What was counted for an account, once: it is closed by this. Raises what asking does."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting[account] = answer
        if self._asking is None:
            self._asking = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting, {}
            try:
                works = _put_together(await self._ask(list(asked)))
                if len(works) != len(asked):  # whoever waits for one that is missing would for ever
                    raise RuntimeError(f"asked for {len(asked)} calls, told of {len(works)}")
            except Exception as error:
                for answer in asked.values():
                    if not answer.done():
                        answer.set_exception(error)
            else:
                for answer, work in zip(asked.values(), works, strict=True):
                    if not answer.done():
                        answer.set_result(work)
        self._asking = None


def _put_together(ranks: Sequence[Any]) -> list[Work]:
    """`ranks`: what each worker gave, None from those for which another one speaks."""
    speaking = [rank for rank in ranks if rank is not None]
    calls = zip(*speaking, strict=True)
    return [Work.over_ranks([_work(*fields) for fields in call]) for call in calls]


def _work(
    layers: int, computed: int, cached: int, slots: Sequence[int], weights: Sequence[int]
) -> Work:
    # What was a tuple has become a list on its way.
    return Work(layers, computed, cached, tuple(slots), tuple(weights))
