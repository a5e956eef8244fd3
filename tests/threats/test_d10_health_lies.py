"""Processes that are there but answer nobody must not look ready."""

import asyncio

import pytest

from expertgate.server.grants import Grants
from expertgate.server.guard import CacheSalts, GuardedLLM
from expertgate.server.liveness import Liveness
from tests.server.audit.logs import RECORD
from tests.server.fakes import FakeEngine


class Stalled(FakeEngine):
    """Answers until it is stalled."""

    def __init__(self):
        super().__init__()
        self.stalled = False

    async def generate(self, *arguments, **named):
        if self.stalled:
            await asyncio.Event().wait()
        async for output in super().generate(*arguments, **named):
            yield output


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def watched(engine, clock, scenario):
    async def go():
        grants = Grants()
        liveness = Liveness(GuardedLLM(engine, grants, CacheSalts(b"w")), grants, RECORD, clock)
        watching = asyncio.create_task(liveness.watch())

        async def after(seconds):
            """So much later by the clock, and once the watch has looked."""
            clock.now += seconds
            await asyncio.sleep(1.1)

        await scenario(liveness, after)
        watching.cancel()
        assert len(grants) <= 1

    asyncio.run(go())


def test_an_engine_that_answers_when_asked_is_ready_however_quiet(clock):
    engine = FakeEngine()

    async def scenario(liveness, after):
        for _ in range(3):
            await after(29)
            assert not liveness.late
        assert len(engine.calls) >= 3

    watched(engine, clock, scenario)


def test_one_that_stalls_is_not_until_it_answers_again(clock):
    engine = Stalled()

    async def scenario(liveness, after):
        await after(6)
        assert not liveness.late
        engine.stalled = True
        await after(6)
        assert not liveness.late
        await after(31)
        assert liveness.late
        liveness._engine.heard += 1  # as of a client's own request
        assert not liveness.late

    watched(engine, clock, scenario)


def test_a_busy_engine_is_not_asked(clock):
    engine = FakeEngine()

    async def scenario(liveness, after):
        for _ in range(2):
            liveness._engine.heard += 1
            await after(4)
        assert engine.calls == []

    watched(engine, clock, scenario)
