"""Who goes next, where more is asked than can run."""

import asyncio

import pytest
from vllm.exceptions import MaxQueuedTokensError, VLLMValidationError

from expertgate.server.turns import Turns


class Calls:
    """Calls that run until they are told to end; `order` is that in which they began."""

    def __init__(self, turns):
        self.turns = turns
        self.order = []
        self.ends = {}
        self.tasks = {}

    def start(self, name, principal, width=1, tokens=10):
        self.ends[name] = asyncio.Event()

        async def call():
            async with self.turns.turn(principal, width, tokens):
                self.order.append(name)
                await self.ends[name].wait()

        self.tasks[name] = asyncio.create_task(call())

    async def settle(self):
        for _ in range(10):
            await asyncio.sleep(0)

    async def end(self, name):
        self.ends[name].set()
        await self.tasks[name]
        await self.settle()

    async def end_all(self):
        for event in self.ends.values():
            event.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def with_calls(room, scenario, most_tokens=None):
    async def go():
        calls = Calls(Turns(room, most_tokens))
        await scenario(calls)
        await calls.end_all()
        assert calls.turns.waiting == 0
        assert calls.turns._running == 0
        assert calls.turns._tokens == 0
        assert calls.turns._accounts == {}

    asyncio.run(go())


def test_who_comes_behind_a_crowd_of_another_goes_next():
    async def scenario(calls):
        for n in range(20):
            calls.start(f"alice {n}", "alice")
        await calls.settle()
        calls.start("bob", "bob")
        await calls.settle()
        assert calls.order == ["alice 0", "alice 1"]
        await calls.end("alice 0")
        assert calls.order[2] == "bob"

    with_calls(2, scenario)


def test_those_who_wait_take_turns_by_what_they_have_had():
    async def scenario(calls):
        calls.start("first", "carol")
        await calls.settle()
        for n in range(4):
            calls.start(f"long {n}", "alice", tokens=300)
        for n in range(4):
            calls.start(f"short {n}", "bob", tokens=100)
        await calls.settle()
        await calls.end("first")
        for _ in range(7):
            await calls.end(calls.order[-1])
        assert calls.order[1:6] == ["long 0", "short 0", "short 1", "short 2", "long 1"]

    with_calls(1, scenario)


def test_an_absence_saves_nothing_up():
    async def scenario(calls):
        calls.start("a", "alice")
        await calls.settle()
        calls.turns.spend("alice", 1_000_000)
        for n in range(3):
            calls.start(f"bob {n}", "bob")
            calls.start(f"alice {n}", "alice")
        await calls.settle()
        for _ in range(6):
            await calls.end(calls.order[-1])
        assert {"alice 0", "bob 0"} == set(calls.order[1:3])

    with_calls(1, scenario)


def test_a_wide_call_is_waited_for_and_not_passed():
    async def scenario(calls):
        calls.start("a", "alice", width=3)
        calls.start("wide", "bob", width=4)
        await calls.settle()
        calls.start("narrow", "alice")
        await calls.settle()
        assert calls.order == ["a"]
        await calls.end("a")
        assert calls.order == ["a", "wide"]
        calls.start("wide again", "bob", width=4)
        await calls.end("wide")
        assert calls.order == ["a", "wide", "narrow"]

    with_calls(4, scenario)


def test_who_stands_behind_a_wide_call_that_leaves_goes_on():
    async def scenario(calls):
        calls.start("a", "alice", width=3)
        calls.start("wide", "bob", width=4)
        await calls.settle()
        calls.start("narrow", "alice")
        calls.tasks["wide"].cancel()
        await calls.settle()
        assert calls.order == ["a", "narrow"]

    with_calls(4, scenario)


def test_what_can_never_run_is_refused():
    async def scenario(calls):
        calls.start("a", "alice", width=5)
        await calls.settle()
        with pytest.raises(VLLMValidationError, match="at most 4"):
            await calls.tasks["a"]

    with_calls(4, scenario)


def test_leaving_while_waiting_or_as_the_turn_comes_loses_no_room():
    async def scenario(calls):
        for name in "abcd":
            calls.start(name, "alice")
        await calls.settle()
        calls.tasks["b"].cancel()
        await calls.settle()
        calls.ends["a"].set()
        await asyncio.sleep(0)  # c has its turn, and has not run yet
        calls.tasks["c"].cancel()
        await calls.settle()
        assert calls.order == ["a", "d"]

    with_calls(1, scenario)


def test_one_that_was_called_off_is_passed_over():
    async def scenario(calls):
        for name in "abc":
            calls.start(name, "alice")
        await calls.settle()
        calls.tasks["b"].cancel()  # and is not given the time to see it
        calls.ends["a"].set()
        await calls.settle()
        assert calls.order == ["a", "c"]

    with_calls(1, scenario)


def test_the_tokens_that_wait_are_bounded():
    async def scenario(calls):
        calls.start("runs", "alice", tokens=1000)
        await calls.settle()
        calls.start("waits", "alice", tokens=60)
        await calls.settle()
        calls.start("too much", "bob", tokens=60)
        calls.start("too long", "bob", tokens=101)
        await calls.settle()
        with pytest.raises(MaxQueuedTokensError):
            await calls.tasks["too much"]
        with pytest.raises(VLLMValidationError, match="at most 100"):
            await calls.tasks["too long"]
        calls.start("fits", "bob", tokens=40)
        await calls.settle()
        await calls.end("runs")
        assert calls.order == ["runs", "fits"]

    with_calls(1, scenario, most_tokens=100)


def test_what_is_over_gives_its_room_to_whoever_waits(monkeypatch):
    monkeypatch.setattr("expertgate.server.turns._LOOK_S", 0.01)
    done = []

    async def scenario(calls):
        async with calls.turns.turn("alice", 2, 10, lambda: bool(done)):
            calls.start("bob", "bob")
            await asyncio.sleep(0.1)
            assert calls.order == []
            done.append(True)
            while calls.order != ["bob"]:
                await asyncio.sleep(0.01)

    with_calls(2, scenario)
