"""Clients that send slowly, or don't read, must not hold what others need."""

import asyncio
import contextlib
import socket
import time
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from expertgate.server import protocol, reading
from expertgate.server.app import show_errors
from expertgate.server.protocol import PatientProtocol
from expertgate.server.reading import read_body

ASK = b"GET /short HTTP/1.1\r\nHost: test\r\n\r\n"
LONG = b"GET /long HTTP/1.1\r\nHost: test\r\n\r\n"
POST = b"POST /body HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"


@pytest.fixture
def served(monkeypatch):
    """Runs a client against a server that has little patience."""
    monkeypatch.setattr(protocol, "HEADERS_S", 0.5)
    monkeypatch.setattr(protocol, "READING_S", 1.0)
    monkeypatch.setattr(reading, "BODY_S", 0.5)
    app = FastAPI()
    app.state.ended = 0
    app.state.service = SimpleNamespace(audit=SimpleNamespace(refused=lambda *_: None))

    async def short():
        return {}

    async def long():
        async def parts():
            try:
                for _ in range(100_000):
                    yield b"x" * 10_000
            finally:
                app.state.ended += 1

        return StreamingResponse(parts())

    async def body(request: Request):
        return {"bytes": len(await read_body(request))}

    app.add_api_route("/short", short)
    app.add_api_route("/long", long)
    app.add_api_route("/body", body, methods=["POST"])
    show_errors(app)

    def run(client):
        async def go():
            with socket.create_server(("127.0.0.1", 0)) as bound:
                config = uvicorn.Config(app, http=PatientProtocol, lifespan="off", log_config=None)
                server = uvicorn.Server(config)
                serving = asyncio.create_task(server.serve(sockets=[bound]))
                while not server.started:
                    await asyncio.sleep(0.01)
                try:
                    await asyncio.wait_for(client(app, bound.getsockname()), 30)
                finally:
                    server.should_exit = True
                    await serving

        asyncio.run(go())

    return run


@contextlib.asynccontextmanager
async def connected(address, **more):
    reader, writer = await asyncio.open_connection(*address, **more)
    try:
        yield reader, writer
    finally:
        writer.close()


async def ends(reader):
    """All that comes until the server closes the connection."""
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""


def test_a_connection_that_asks_nothing_is_closed(served):
    async def client(app, address):
        async with connected(address) as (reader, _):
            assert await ends(reader) == b""

    served(client)


def test_headers_that_drip_are_cut_off(served):
    async def client(app, address):
        for before in (b"", ASK):  # as the first request of a connection, and as a later one
            async with connected(address) as (reader, writer):
                writer.write(before)
                if before:
                    await reader.readuntil(b"{}")
                began = time.monotonic()
                with contextlib.suppress(ConnectionError):
                    for byte in ASK * 3:
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(0.1)
                        if reader.at_eof() or time.monotonic() - began > 5:
                            break
                assert await ends(reader) == b""

    served(client)


def test_a_body_that_drips_is_a_408(served):
    async def client(app, address):
        async with connected(address) as (reader, writer):
            writer.write(POST + b"Content-Length: 1000\r\n\r\n{")
            found = await ends(reader)
            assert found.startswith(b"HTTP/1.1 408 ")
            assert b'"request_timeout"' in found

    served(client)


def test_whoever_stops_reading_is_cut_off_and_what_was_read_for_it_ends(served):
    async def client(app, address):
        async with connected(address, limit=1000) as (_, writer):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            writer.write(LONG)
            began = time.monotonic()
            while not app.state.ended and time.monotonic() - began < 20:
                await asyncio.sleep(0.1)
            assert app.state.ended == 1

    served(client)


def test_whoever_asks_and_reads_is_served_for_as_long_as_it_likes(served):
    async def client(app, address):
        async with connected(address) as (reader, writer):
            for _ in range(4):
                writer.write(ASK)
                await reader.readuntil(b"{}")
                await asyncio.sleep(0.3)
            writer.write(LONG)
            began, size = time.monotonic(), 0
            while time.monotonic() - began < 2.5:
                size += len(await reader.read(1_000_000))
                await asyncio.sleep(0.01)
            assert size > 1_000_000
            assert app.state.ended == 0

    served(client)


def test_stalled_readers_keep_nobody_from_the_engine(server):
    body = b'{"prompt":"hi","max_tokens":1000,"ignore_eos":true,"stream":true,"logprobs":5}'
    key = server.keys["alice"]
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stalled = stack.enter_context(socket.socket())
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = server.url.removeprefix("http://").split(":")
            stalled.connect((host, int(port)))
            stalled.sendall(head.encode() + body)
        assert server.complete("bob").status_code == 200
