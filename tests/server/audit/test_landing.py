"""Waiting for another thread: one turn of the loop, and a task's ways of giving up."""

import asyncio
import threading
from concurrent.futures import Future

import pytest

from expertgate.server.audit.landing import Landing


async def landed(future):
    return await Landing(future)


async def turns_until(task, act):
    """How many turns of the loop `task` needs to end after `act`."""
    await asyncio.sleep(0)
    act()
    turns = 0
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    return turns


def test_a_result_is_there_one_turn_sooner_than_asyncios():
    async def count(wait):
        future = Future()
        task = asyncio.create_task(wait(future))
        return await turns_until(task, lambda: future.set_result("here"))

    async def wrapped(future):
        return await asyncio.wrap_future(future)

    assert asyncio.run(count(landed)) == asyncio.run(count(wrapped)) - 1


def test_what_another_thread_brings_arrives():
    async def wait(future):
        threading.Timer(0.05, future.set_result, ["here"]).start()
        return await Landing(future)

    assert asyncio.run(wait(Future())) == "here"


def test_what_is_there_already_takes_no_turn():
    async def at_once(future):
        with pytest.raises(StopIteration) as ended:
            landed(future).send(None)
        return ended.value.value

    future = Future()
    future.set_result("here")
    assert asyncio.run(at_once(future)) == "here"


def test_an_error_is_raised_where_it_is_waited_for():
    async def wait(future):
        task = asyncio.create_task(landed(future))
        await asyncio.sleep(0)
        future.set_exception(OSError("full"))
        await task

    with pytest.raises(OSError, match="full"):
        asyncio.run(wait(Future()))


def test_giving_up_cancels_the_future():
    async def wait(future):
        task = asyncio.create_task(landed(future))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    future = Future()
    asyncio.run(wait(future))
    assert future.cancelled()


@pytest.mark.parametrize("done", [False, True])
def test_giving_up_in_the_last_moment(done):
    """The other thread is at it, or has just done it: the task is cancelled all the same."""

    async def wait(future):
        task = asyncio.create_task(landed(future))
        await asyncio.sleep(0)
        assert future.set_running_or_notify_cancel()
        if done:
            future.set_result("here")
        task.cancel()
        if not done:
            await asyncio.sleep(0)
            future.set_result("here")
        with pytest.raises(asyncio.CancelledError):
            await task

    future = Future()
    asyncio.run(wait(future))
    assert future.result(0) == "here"


def test_a_limit_of_time_ends_the_waiting():
    async def wait():
        async with asyncio.timeout(0.05):
            await Landing(Future())

    with pytest.raises(TimeoutError):
        asyncio.run(wait())


def test_a_loop_that_has_ended_is_left_alone(caplog):
    future = Future()

    async def leave():
        waiting = landed(future)
        landing = waiting.send(None)
        landing.add_done_callback(print, context=None)
        waiting.close()

    asyncio.run(leave())
    future.set_result("here")
    assert not caplog.records
