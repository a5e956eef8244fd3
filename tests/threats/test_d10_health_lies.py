"""Processes that are there but answer nobody must not look ready."""

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expertgate.server.cache_salts import CacheSalts
from expertgate.server.grants import Grants
from expertgate.server.guard import GuardedLLM
from expertgate.server.liveness import Liveness
from tests.server.audit.logs import RECORDED
from tests.server.fakes import FakeEngine
from tests.server.running import Server, make_key, prepare, start, stop
from tests.server.test_guard import MATH, PROMPT, params
from tests.support.waiting import until


class Stalled(FakeEngine):
    """Answers until it is stalled."""

    def __init__(self):
        super().__init__()
        self.busy = self.stalled = False
        """With answers that show nothing before their ends; and altogether."""

    async def generate(self, *arguments, **named):
        if self.busy or self.stalled:
            await asyncio.Event().wait()
        async for output in super().generate(*arguments, **named):
            yield output

    async def collective_rpc(self, *arguments, **named):
        if self.stalled:
            await asyncio.Event().wait()
        return await super().collective_rpc(*arguments, **named)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


class Watched:
    """A guarded engine, and the watch over it."""

    def __init__(self, engine, clock):
        self.clock = clock
        self.grants = Grants()
        self.guard = GuardedLLM(engine, self.grants, CacheSalts(b"w"))
        self.liveness = Liveness(self.guard, self.grants, RECORDED, clock)

    @property
    def late(self):
        return self.liveness.late

    async def after(self, seconds):
        """So much later by the clock, and once the watch has looked."""
        self.clock.now += seconds
        await asyncio.sleep(1.1)


def watch(engine, clock, scenario):
    async def go():
        watched = Watched(engine, clock)
        watching = asyncio.create_task(watched.liveness.watch())
        await scenario(watched)
        watching.cancel()
        assert len(watched.grants) <= 1

    asyncio.run(go())


def test_an_engine_that_answers_when_asked_is_ready_however_quiet(clock):
    engine = FakeEngine()

    async def scenario(watched):
        for _ in range(3):
            await watched.after(29)
            assert not watched.late
        assert len(engine.calls) >= 3

    watch(engine, clock, scenario)


def test_one_that_stalls_is_not_until_it_answers_again(clock):
    engine = Stalled()

    async def scenario(watched):
        await watched.after(6)
        assert not watched.late
        engine.stalled = True
        await watched.after(6)
        assert not watched.late
        await watched.after(31)
        assert watched.late
        watched.guard.heard += 1  # as of a client's own request
        assert not watched.late

    watch(engine, clock, scenario)


def test_a_busy_engine_is_not_asked(clock):
    engine = FakeEngine()

    async def scenario(watched):
        for _ in range(2):
            watched.guard.heard += 1
            await watched.after(4)
        assert engine.calls == []

    watch(engine, clock, scenario)


def test_one_that_is_full_of_answers_in_one_piece_is_ready_while_it_goes_on(clock):
    engine = Stalled()
    engine.busy = True

    async def scenario(watched):
        with watched.grants.issue(MATH, "alice", recorded=RECORDED) as grant:
            answer = watched.guard.generate(PROMPT, params(grant.handle), "a")
            asked = asyncio.create_task(anext(answer))
            for _ in range(4):
                await watched.after(29)
                assert not watched.late
            assert len(watched.grants) == 1  # a token would stand behind what runs
            engine.stalled = True
            await watched.after(6)
            await watched.after(31)
            assert watched.late
            asked.cancel()
            await asyncio.wait([asked])
            engine.stalled = False

    watch(engine, clock, scenario)


HASTY = """
from expertgate.server import cli, liveness
liveness._QUIET_S, liveness._LATE_S = 1.0, 3.0
cli.main()
"""
"""The server, with less patience than the 30 seconds that it has."""


def engines_of(server: Server) -> list[int]:
    """The engine's own processes, by what they call themselves."""
    found = []
    for pid in server.children():
        title = Path(f"/proc/{pid}/cmdline")
        if title.exists() and any(name in title.read_text() for name in ("EngineCore", "Worker")):
            found.append(pid)
    return found


def test_a_real_engine_that_is_stopped_is_not_ready_and_a_dead_one_is_told(tmp_path):
    prepare(tmp_path)
    key = make_key(tmp_path, "alice", "research")
    server = start(tmp_path, command=("-c", HASTY))
    server.keys = {"alice": key}
    try:
        children, engines = server.children(), engines_of(server)
        assert engines
        for pid in engines:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: server.get("/ready").status_code == 503)
        assert server.get("/ready").json()["why"] == "the engine does not answer"
        assert server.get("/health").status_code == 200  # it may come to itself
        for pid in engines:
            os.kill(pid, signal.SIGCONT)
        until(lambda: server.get("/ready").status_code == 200)

        with ThreadPoolExecutor(2) as pool:
            # So much that it can't end before the engine does, however slow this machine is.
            body = {"max_tokens": 1900, "ignore_eos": True, "prompt": ["hi"] * 32}
            whole = pool.submit(server.complete, "alice", **body)
            stream = pool.submit(server.complete, "alice", stream=True, **body)
            time.sleep(1)
            for pid in engines:
                os.kill(pid, signal.SIGSTOP)
            until(lambda: server.get("/ready").status_code == 503)
            for pid in engines:
                os.kill(pid, signal.SIGKILL)
            assert whole.result().status_code == 503
            assert whole.result().json()["error"]["code"] == "engine_unavailable"
            assert '"code":"engine_unavailable"' in stream.result().text
        response = server.complete("alice")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children))
    finally:
        for pid in server.children():  # one that is stopped hears no other signal
            os.kill(pid, signal.SIGCONT)
        stop(server)
