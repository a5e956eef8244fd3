"""Who goes next, where more is asked than can run."""

import asyncio

import pytest
from vllm.exceptions import MaxQueuedTokensError, VLLMValidationError

from expertgate.server import turns
from expertgate.server.turns import Turns


class Engine:
    """How far the engine is with a call."""

    def __init__(self):
        self.at_work = self.done = False

    def begun(self):
        return self.at_work

    def over(self):
        return self.done


class Calls:
    """Calls that run until they are told to end; `order` is that in which they began."""

    def __init__(self, turns):
        self.turns = turns
        self.order = []
        self.ends = {}
        self.tasks = {}

    def start(self, name, principal, width=1, tokens=10, progress=None):
        self.ends[name] = asyncio.Event()

        async def call():
            async with self.turns.turn(principal, width, tokens, progress):
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


def with_calls(room, scenario, most_tokens=None, most_ahead=None):
    async def go():
        calls = Calls(Turns(room, most_tokens, most_ahead))
        await scenario(calls)
        await calls.end_all()
        assert calls.turns.waiting == 0
        assert calls.turns._accounts == {}, "somebody is remembered"
        await nothing_is_held(calls)

    asyncio.run(go())


async def nothing_is_held(calls):
    """One call may have the whole room, though the engine doesn't begin it, and any may wait."""
    calls.start("widest", "widest", width=calls.turns.room, progress=Engine())
    calls.start("longest", "longest", tokens=1_000_000)
    await calls.settle()
    assert calls.order[-1] == "widest"
    assert calls.turns.waiting == 1
    await calls.end_all()
    assert calls.order[-1] == "longest"
    assert calls.turns.waiting == 0


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


def test_whoever_always_waits_is_not_passed_by_those_who_come_and_go():
    async def scenario(calls):
        calls.start("first", "alice")
        for n in range(100):
            calls.start(f"alice {n}", "alice")
        for n in range(3):
            calls.start(f"0 of {n}", f"guest {n}")
        await calls.settle()
        await calls.end("first")
        for _ in range(80):
            last = calls.order[-1]
            if " of " in last:  # the guest asks again as soon as it is answered, once a time
                count, guest = last.split(" of ")
                await calls.end(last)
                calls.start(f"{int(count) + 1} of {guest}", f"guest {guest}")
                await calls.settle()
            else:
                await calls.end(last)
        served = sum(name.startswith("alice") for name in calls.order)
        assert 15 <= served <= 25, calls.order

    with_calls(1, scenario)


def test_what_was_had_while_nobody_waited_is_no_debt():
    async def scenario(calls):
        calls.start("a", "alice", tokens=1_000)
        await calls.settle()
        calls.turns.spend("alice", 1_000_000)
        for n in range(2):
            calls.start(f"bob {n}", "bob")
            calls.start(f"alice {n}", "alice")
        await calls.settle()
        await calls.end("a")
        await calls.end(calls.order[-1])
        assert set(calls.order[1:]) == {"bob 0", "alice 0"}
        for _ in range(2):
            await calls.end(calls.order[-1])
        assert set(calls.order[3:]) == {"bob 1", "alice 1"}

    with_calls(1, scenario)


def test_what_was_had_before_nobody_waited_is_forgotten():
    async def scenario(calls):
        for name in ("stays", "a"):
            calls.start(name, "alice")
        calls.start("carol", "carol")
        await calls.settle()
        calls.turns.spend("alice", 1_000_000)  # while carol waits
        await calls.end("a")
        calls.start("bob 0", "bob")
        calls.start("alice 0", "alice")
        calls.start("bob 1", "bob")
        await calls.settle()
        for _ in range(3):
            await calls.end(calls.order[-1])
        assert calls.order[3:] == ["bob 0", "alice 0", "bob 1"]

    with_calls(2, scenario)


def test_one_that_runs_and_begins_to_wait_has_saved_nothing_up():
    async def scenario(calls):
        calls.start("idle", "bob")
        for n in range(20):
            calls.start(f"alice {n}", "alice", tokens=1_000)
            calls.start(f"carol {n}", "carol", tokens=1_000)
        await calls.settle()
        for _ in range(8):
            await calls.end(next(name for name in reversed(calls.order) if name != "idle"))
        for n in range(20):
            calls.start(f"bob {n}", "bob", tokens=1_000)
        await calls.settle()
        before = len(calls.order)
        for _ in range(9):
            await calls.end(next(name for name in reversed(calls.order) if name != "idle"))
        late = [name.split()[0] for name in calls.order[before:]]
        assert {who: late.count(who) for who in set(late)} == {"alice": 3, "bob": 3, "carol": 3}

    with_calls(2, scenario)


def test_the_tokens_that_wait_are_bounded():
    async def scenario(calls):
        calls.start("runs", "alice", tokens=1000)
        await calls.settle()
        calls.start("waits", "alice", tokens=40)
        await calls.settle()
        calls.start("too much", "bob", tokens=31)
        await calls.settle()
        assert calls.tasks["too much"].done()
        with pytest.raises(MaxQueuedTokensError):
            await calls.tasks["too much"]
        calls.start("fits", "bob", tokens=30)
        await calls.settle()
        await calls.end("runs")
        assert calls.order == ["runs", "fits"]

    with_calls(1, scenario, most_tokens=100)


def test_a_prompt_of_any_length_may_wait_where_none_does():
    async def scenario(calls):
        calls.start("runs", "alice")
        calls.start("long", "bob", tokens=101)
        calls.start("another", "carol", tokens=1)
        await calls.settle()
        assert not calls.tasks["long"].done()
        with pytest.raises(MaxQueuedTokensError):
            await calls.tasks["another"]

    with_calls(1, scenario, most_tokens=100)


def test_who_fills_the_wait_with_tokens_leaves_a_place_to_others():
    async def scenario(calls):
        calls.start("runs", "alice")
        for n in range(10):
            calls.start(f"alice {n}", "alice", tokens=10)
        await calls.settle()
        refused = [n for n in range(10) if calls.tasks[f"alice {n}"].done()]
        assert refused == [5, 6, 7, 8, 9]
        calls.start("bob", "bob", tokens=20)
        calls.start("carol", "carol", tokens=10)
        await calls.settle()
        assert not calls.tasks["bob"].done()
        assert not calls.tasks["carol"].done()
        for n in refused:
            with pytest.raises(MaxQueuedTokensError):
                await calls.tasks[f"alice {n}"]

    with_calls(1, scenario, most_tokens=100)


def test_no_more_is_handed_over_than_what_the_engine_begins(monkeypatch):
    monkeypatch.setattr("expertgate.server.turns._LOOK_S", 0.01)

    async def scenario(calls):
        far = [Engine() for _ in range(6)]
        for n in range(5):
            calls.start(f"alice {n}", "alice", progress=far[n])
        await calls.settle()
        calls.start("bob", "bob", progress=far[5])
        await calls.settle()
        assert calls.order == ["alice 0", "alice 1"]
        far[0].at_work = True  # nothing comes out of it before its end, so this is looked for
        while len(calls.order) < 3:
            await asyncio.sleep(0.01)
        assert calls.order[2] == "bob"
        await asyncio.sleep(0.05)
        assert len(calls.order) == 3
        await calls.end("alice 1")  # one that has ended is not ahead either
        assert calls.order[3:] == ["alice 2"]

    with_calls(10, scenario, most_ahead=2)


def test_one_that_is_wider_than_what_may_be_ahead_goes_alone():
    async def scenario(calls):
        calls.start("a", "alice", progress=Engine())
        calls.start("wide", "bob", width=4, progress=Engine())
        await calls.settle()
        assert calls.order == ["a"]
        await calls.end("a")
        assert calls.order == ["a", "wide"]

    with_calls(10, scenario, most_ahead=2)


def test_what_is_over_gives_its_room_to_whoever_waits(monkeypatch):
    monkeypatch.setattr("expertgate.server.turns._LOOK_S", 0.01)

    async def scenario(calls):
        progress = Engine()
        async with calls.turns.turn("alice", 2, 10, progress):
            calls.start("bob", "bob")
            await asyncio.sleep(0.1)
            assert calls.order == []
            progress.done = True
            while calls.order != ["bob"]:
                await asyncio.sleep(0.01)

    with_calls(2, scenario)


def test_however_many_wait_there_is_one_look():
    looks = []

    class Seen(Engine):
        def over(self):
            looks.append(1)
            return False

    async def scenario(calls):
        calls.start("runs", "alice", progress=Seen())
        for n in range(50):
            calls.start(f"{n}", "alice")
        await asyncio.sleep(3 * turns._LOOK_S)
        assert 0 < len(looks) <= 4

    with_calls(1, scenario)
