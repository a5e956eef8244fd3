"""Names of hosts, with a resolver that hangs."""

import asyncio
import socket
import threading

import httpx
import pytest
import uvloop

from expertgate.server.lookups import look_up_beside

LOOPS = [asyncio.SelectorEventLoop, uvloop.new_event_loop]


@pytest.fixture
def resolver(monkeypatch):
    """One that says nothing until `go_on` is set; `asked` is what it was asked, `told` what for."""

    class Resolver:
        go_on = threading.Event()
        asked, told = [], []

    def hang(host, *_, **__):
        Resolver.asked.append(host)
        Resolver.go_on.wait(60)
        Resolver.told.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "no resolver answers")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    yield Resolver
    Resolver.go_on.set()


@pytest.mark.parametrize("make_loop", LOOPS)
def test_a_loop_ends_though_a_lookup_does_not(resolver, make_loop):
    async def story():
        loop = asyncio.get_running_loop()
        look_up_beside(loop)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await loop.getaddrinfo("issuer.invalid", 443, type=socket.SOCK_STREAM)

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(story())
    assert not resolver.told
    assert resolver.asked == ["issuer.invalid"]  # those who came later wait for the first


@pytest.mark.parametrize("make_loop", LOOPS)
def test_what_is_found_out_is_told_and_asked_for_again(resolver, make_loop):
    resolver.go_on.set()

    async def story():
        look_up_beside(asyncio.get_running_loop())
        for _ in range(2):
            with pytest.raises(httpx.ConnectError, match="no resolver answers"):
                async with httpx.AsyncClient(trust_env=False) as client:
                    await client.get("http://issuer.invalid/keys")

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(story())
    assert len(resolver.told) == 2


@pytest.mark.parametrize("make_loop", LOOPS)
def test_names_are_found(make_loop):
    async def story():
        look_up_beside(asyncio.get_running_loop())
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(httpx.RemoteProtocolError):  # it was there, and said nothing
            async with httpx.AsyncClient(trust_env=False) as client:
                await client.get(f"http://localhost:{port}/")
        server.close()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(story())
