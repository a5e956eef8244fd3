"""Clients that send slowly, or don't read, must not hold what others need."""

import asyncio
import contextlib
import logging
import socket
import time
from concurrent import futures
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from expertgate.server import protocol, reading, room, run
from expertgate.server.app import show_errors
from expertgate.server.reading import read_body
from tests.server.coreless import Coreless
from tests.support.waiting import until

ASK = b"GET /short HTTP/1.1\r\nHost: test\r\n\r\n"
LONG = b"GET /long HTTP/1.1\r\nHost: test\r\n\r\n"
WEBSOCKET = (
    b"GET /short HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

POST = b"POST /body HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"


@pytest.fixture
def served(monkeypatch):
    """Runs a client against a server that has little patience; what never comes ends the test."""
    monkeypatch.setattr(protocol, "HEADERS_S", 0.5)
    monkeypatch.setattr(protocol, "READING_S", 1.0)
    monkeypatch.setattr(reading, "BODY_S", 0.5)
    monkeypatch.setattr(run, "_CUT_S", 1)
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

    async def slow():
        async def parts():
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0.01)
            finally:
                app.state.ended += 1

        return StreamingResponse(parts())

    async def body(request: Request):
        return {"bytes": len(await read_body(request))}

    async def headers(request: Request):
        await read_body(request)
        return dict(request.scope["headers"])

    app.add_api_route("/headers", headers, methods=["POST"])
    app.add_api_route("/short", short)
    app.add_api_route("/long", long)
    app.add_api_route("/slow", slow)
    app.add_api_route("/body", body, methods=["POST"])
    show_errors(app)

    def serve(client, keep_alive_s=1):
        async def go():
            with socket.create_server(("127.0.0.1", 0)) as bound:
                listener = run.Listener(app, bound, None, keep_alive_s)
                server = uvicorn.Server(run._config(listener, 0))
                serving = asyncio.create_task(server.serve(sockets=[bound]))
                while not server.started:
                    await asyncio.sleep(0.01)
                try:
                    await asyncio.wait_for(client(app, bound.getsockname()), 30)
                finally:
                    server.should_exit = True
                    await serving

        asyncio.run(go())

    return serve


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


def test_a_connection_stays_between_requests_for_as_long_as_was_said(served):
    async def client(app, address):
        async with connected(address) as (reader, writer):
            for _ in range(2):
                writer.write(ASK)
                await reader.readuntil(b"{}")
                await asyncio.sleep(5.5)  # beyond uvicorn's own patience
        async with connected(address) as (reader, writer):
            writer.write(ASK)
            assert (await ends(reader)).endswith(b"{}")  # and then no longer

    served(client, keep_alive_s=7)


@pytest.mark.parametrize("behind", [b"", ASK, ASK + ASK, WEBSOCKET])
def test_an_answer_ends_with_its_client_whatever_was_asked_behind_it(served, behind):
    async def client(app, address):
        async with connected(address) as (reader, writer):
            writer.write(ASK.replace(b"short", b"slow") + behind)
            await reader.readuntil(b"x")
        deadline = time.monotonic() + 10
        while not app.state.ended:
            assert time.monotonic() < deadline, "it is told to nobody"
            await asyncio.sleep(0.05)

    served(client)


def test_whoever_asks_for_a_websocket_has_an_answer_of_plain_http(served, caplog):
    async def client(app, address):
        async with connected(address) as (reader, writer):
            writer.write(WEBSOCKET)
            head = await reader.readuntil(b"{}")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"upgrade" not in head.lower()
            await ends(reader)  # patience has, as with others

    served(client)
    assert "WebSocket" not in caplog.text  # it is the client's affair


@pytest.mark.parametrize("piece_bytes", [1 << 16, 50, 7])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_body_of_who_asks_for_another_protocol_is_no_request(served, chunked, piece_bytes):
    """Clients of HTTP/2 ask so; and a smuggled one would be answered to whoever comes next."""
    body = ASK * 2
    length = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    chunks = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    asking = POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + (chunks if chunked else length)
    sent = asking * 2 + ASK + WEBSOCKET + ASK

    async def client(app, address):
        async with connected(address) as (reader, writer):
            for start in range(0, len(sent), piece_bytes):
                writer.write(sent[start : start + piece_bytes])
                await asyncio.sleep(0.001)
            answers = (await ends(reader)).split(b"HTTP/1.1 200 OK\r\n")
        bodies = [answer.partition(b"\r\n\r\n")[2] for answer in answers[1:]]
        assert bodies == [b'{"bytes":%d}' % len(body)] * 2 + [b"{}"] * 3

    served(client)


def test_who_asks_for_too_much_behind_an_answer_is_cut_off(served):
    """Else all of it would be kept until its turn comes, of anybody's: nobody has said who asks."""

    async def client(app, address):
        async with connected(address) as (reader, writer):
            writer.write(ASK.replace(b"short", b"slow") + ASK * 10_000)
            await ends(reader)
        deadline = time.monotonic() + 10
        while not app.state.ended:
            assert time.monotonic() < deadline, "it is told to nobody"
            await asyncio.sleep(0.05)

    served(client)


def test_what_is_asked_behind_an_answer_is_answered(served):
    async def client(app, address):
        async with connected(address) as (reader, writer):
            for _ in range(3):
                writer.write(ASK * (1 + protocol.MAX_BEHIND))
                for _ in range(1 + protocol.MAX_BEHIND):
                    assert (await reader.readuntil(b"{}")).startswith(b"HTTP/1.1 200 ")

    served(client)


def test_headers_that_drip_are_cut_off(served):
    async def client(app, address):
        for before in (b"", ASK):  # as the first request of a connection, and as a later one
            async with connected(address) as (reader, writer):
                writer.write(before)
                if before:
                    await reader.readuntil(b"{}")
                with contextlib.suppress(ConnectionError):
                    while not reader.at_eof():  # a header that never ends
                        writer.write(b"x")
                        await writer.drain()
                        await asyncio.sleep(0.1)
                assert await ends(reader) == b""

    served(client)


BIG = b"x" * (protocol.MAX_HEAD_BYTES + 1)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /short HTTP/1.1\r\nHost: test\r\nX-Big: " + BIG + b"\r\n\r\n",
        b"GET /short HTTP/1.1\r\nHost: test\r\nX-Big: " + 8 * BIG,  # and no end
        b"GET /short HTTP/1.1\r\nHost: test\r\n" + 8 * BIG,
        b"GET /short?" + BIG + b" HTTP/1.1\r\nHost: test\r\n\r\n",
        b"GET /short HTTP/1.1\r\nHost: test\r\n" + b"X-Small: x\r\n" * 10_000 + b"\r\n",
        8 * BIG,
    ],
    ids=["a header", "a header without an end", "a name", "a target", "many", "a method"],
)
@pytest.mark.parametrize("before", [b"", ASK], ids=["first", "later"])
def test_a_head_that_is_too_large_is_not_read(served, monkeypatch, head, before):
    monkeypatch.setattr(protocol, "HEADERS_S", 600)  # it is not patience that ends

    async def client(app, address):
        async with connected(address) as (reader, writer):
            writer.write(before)
            if before:
                await reader.readuntil(b"{}")
            with contextlib.suppress(ConnectionError):
                writer.write(head)
                await writer.drain()
            found = await ends(reader)
            assert found == b"" or found.startswith(b"HTTP/1.1 400 ")

    served(client)


def test_a_head_that_is_not_too_large_is_read(served):
    async def client(app, address):
        async with connected(address) as (reader, writer):
            for _ in range(3):
                writer.write(ASK[:-2] + b"X-Big: " + BIG[200:] + b"\r\n\r\n")
                assert (await reader.readuntil(b"{}")).startswith(b"HTTP/1.1 200 ")

    served(client)


def test_a_body_is_no_head(served):
    async def client(app, address):
        async with connected(address) as (reader, writer):
            for _ in range(3):
                writer.write(POST + b"Content-Length: %d\r\n\r\n" % (4 * len(BIG)) + 4 * BIG)
                assert b'{"bytes":262148}' in await reader.readuntil(b"}")

    served(client)


def test_trailers_are_no_headers(served):
    async def client(app, address):
        async with connected(address) as (reader, writer):
            writer.write(
                POST.replace(b"/body", b"/headers") + b"Transfer-Encoding: chunked\r\n\r\n"
            )
            writer.write(b"2\r\n{}\r\n0\r\nX-Forwarded-User: mallory\r\n\r\n")
            found = await reader.readuntil(b"}")
            assert b'"host":"test"' in found
            assert b"mallory" not in found

    served(client)


CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"


@pytest.mark.parametrize(
    "trailers",
    [b"X-Big: " + 8 * BIG, 8 * BIG, b"X-Small: x\r\n" * 100_000],
    ids=["without an end", "a name", "many"],
)
@pytest.mark.parametrize("route", [b"/body", b"/short"], ids=["read", "answered"])
def test_trailers_that_are_too_large_are_not_gathered(served, monkeypatch, trailers, route):
    for patience in (protocol, "HEADERS_S"), (reading, "BODY_S"):
        monkeypatch.setattr(*patience, 600)  # it is not patience that ends

    async def client(app, address):
        async with connected(address) as (reader, writer):
            writer.write(CHUNKED.replace(b"/body", route))
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(trailers), 10_000):
                    writer.write(trailers[start : start + 10_000])
                    await writer.drain()
            await ends(reader)

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
            while not app.state.ended:
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
            size = 0
            for _ in range(250):
                size += len(await reader.read(1_000_000))
                await asyncio.sleep(0.01)
            assert size > 1_000_000
            assert app.state.ended == 0

    served(client)


@pytest.fixture
def coreless(tmp_path):
    """Starts a server whose engine runs so many choices at once."""
    with contextlib.ExitStack() as stack:

        def start(runs):
            server = Coreless(tmp_path, max_num_seqs=runs)
            stack.callback(server.close)
            return server

        yield start


def stalled(stack, server):
    """Asks for much, and reads nothing of it."""
    body = b'{"prompt":"hi","max_tokens":1000,"ignore_eos":true,"stream":true,"logprobs":5}'
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.keys['alice']}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader = stack.enter_context(socket.socket())
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = server.url.removeprefix("http://").split(":")
    reader.connect((host, int(port)))
    reader.sendall(head.encode() + body)


def test_what_the_engine_is_done_with_holds_no_turn(coreless, monkeypatch):
    """Else stalled readers, as many as the engine runs, would let nobody in till they are cut."""
    monkeypatch.setattr(protocol, "READING_S", 1e6)  # and so they never are
    server = coreless(runs=2)
    server.bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of all who connect
    server.core.most_tokens, server.core.step_s = 500, 0.001
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stalled(stack, server)
        requests = server.llm.output_processor.external_req_ids
        while server.running < 2 or requests:  # both have begun, and the engine is done
            time.sleep(0.01)
        server.core.most_tokens = 4
        headers = server.headers("bob")
        url = f"{server.url}/v1/completions"
        answer = httpx.post(url, json={"prompt": "hi"}, headers=headers, timeout=60)
        assert answer.status_code == 200
        assert server.running == 2  # which nobody has read to their ends


def test_who_does_not_read_keeps_no_expert_that_is_withdrawn(coreless, monkeypatch, caplog):
    """The word of it can't be sent either, and what runs must not wait for that."""
    caplog.set_level(logging.INFO, "expertgate.access")
    monkeypatch.setattr(protocol, "READING_S", 1e6)
    server = coreless(runs=2)
    server.bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server.core.most_tokens, server.core.step_s = 1000, 0.003
    grants = server.service.grants

    def sent():
        return [sum(call.generated.values()) for grant in grants for call in grant.calls]

    with contextlib.ExitStack() as stack:
        stalled(stack, server)
        before = None
        while not sent() or sent() != before:  # until the socket is full
            before = sent()
            time.sleep(0.1)
        assert server.llm.output_processor.request_states
        (grant,) = grants
        loop = server.llm.output_handler.get_loop()
        loop.call_soon_threadsafe(grant.withdraw)
        until(lambda: not server.engine.busy)
        assert not server.llm.output_processor.request_states
    until(lambda: [r for r in caplog.records if r.name == "expertgate.access"])
    [line] = [r.facts for r in caplog.records if r.name == "expertgate.access"]
    assert (line["status"], line["code"]) == (200, "expert_withdrawn"), (
        "its line says nothing of it"
    )


def test_an_answer_in_one_piece_is_seen_to_have_begun(coreless, monkeypatch):
    """Else answers that show nothing before their ends would seem to stand in the engine's queue"""
    monkeypatch.setattr(room, "_LEAST_AHEAD", 1)
    server = coreless(runs=8)
    server.core.most_tokens, server.core.step_s = 1000, 0.005
    url, body = f"{server.url}/v1/completions", {"prompt": "hi", "max_tokens": 1000}
    with futures.ThreadPoolExecutor() as pool:
        long = pool.submit(httpx.post, url, json=body, headers=server.headers(), timeout=60)
        while not server.core.work:
            time.sleep(0.01)
        server.core.most_tokens = 4
        answer = httpx.post(url, json=body, headers=server.headers("bob"), timeout=60)
        assert answer.status_code == 200
        assert server.running == 1  # alice's
        assert long.result().status_code == 200


def test_what_the_engine_has_not_begun_lets_others_wait(coreless, monkeypatch):
    monkeypatch.setattr(room, "_LEAST_AHEAD", 1)
    server = coreless(runs=8)
    server.core.instead = lambda: None
    url, body = f"{server.url}/v1/completions", {"prompt": "hi"}
    with futures.ThreadPoolExecutor() as pool:
        for n in range(3):
            asked = pool.submit(httpx.post, url, json=body, headers=server.headers(), timeout=2)
            while server.waiting < n:
                time.sleep(0.01)
        time.sleep(0.3)
        assert (server.running, server.waiting) == (1, 2)
        with pytest.raises(httpx.ReadTimeout):
            asked.result()


def test_stalled_readers_keep_nobody_from_the_engine(server):
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stalled(stack, server)
        assert server.complete("bob").status_code == 200
