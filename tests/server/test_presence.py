"""What runs for a client ends when the client leaves."""

import asyncio
import gc

import pytest

from expertgate.server.presence import ClientGone, while_there


class Client:
    """Leaves when it is told to."""

    def __init__(self):
        self.left = asyncio.Event()
        self.asked = 0

    async def receive(self):
        self.asked += 1
        if self.asked == 1:  # an empty rest of the body
            return {"type": "http.request"}
        await self.left.wait()
        return {"type": "http.disconnect"}


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


async def within(client, work):
    async with while_there(client.receive):
        return await work


def test_what_is_done_in_time_is_given_back():
    async def run():
        assert await within(Client(), asyncio.sleep(0, "done")) == "done"
        await turns()
        assert len(asyncio.all_tasks()) == 1, "nobody watches any more"

    asyncio.run(run())


def test_what_waits_ends_when_the_client_leaves():
    async def run():
        client, ended = Client(), []

        async def work():
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        asking = asyncio.create_task(within(client, work()))
        await turns()
        assert not asking.done()
        client.left.set()
        with pytest.raises(ClientGone):
            await asking
        assert ended == [True]
        assert asking.cancelling() == 0, "the request goes on: it has a record to end"

    asyncio.run(run())


def test_an_error_made_of_being_ended_is_that_the_client_has_left():
    async def run():
        client = Client()

        async def work():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("Client disconnected") from None

        asking = asyncio.create_task(within(client, work()))
        await turns()
        client.left.set()
        with pytest.raises(ClientGone):
            await asking

    asyncio.run(run())


def test_an_error_while_the_client_is_there_is_raised():
    async def run():
        async def work():
            raise TimeoutError("its own")

        with pytest.raises(TimeoutError, match="its own"):
            await within(Client(), work())

    asyncio.run(run())


async def an_error():
    raise ValueError("Client disconnected")


@pytest.mark.parametrize("made", [an_error, lambda: asyncio.sleep(0, "an answer")])
def test_what_is_made_of_being_called_off_from_outside_is_no_answer(made):
    async def run():
        async def work():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return await made()

        asking = asyncio.create_task(within(Client(), work()))
        await turns()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(run())


def test_being_called_off_from_outside_is_not_the_client(caplog):
    async def run():
        withdrawn = asyncio.Event()

        async def work():
            await withdrawn.wait()
            raise RuntimeError("too late")

        asking = asyncio.create_task(within(Client(), work()))
        await turns()
        withdrawn.set()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(run())
    gc.collect()
    assert caplog.records == []
