"""What the benchmarks of the server count; the servers themselves run in them."""

import socket
import threading

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from benchmarks.load import Answer, Job, client
from benchmarks.soak import _ends

LAST = '"finish_reason":"length"'
EVENTS = {
    "whole": ['data: {"n": 1}', 'data: {"n": 2}', f"data: {{{LAST}}}", "data: [DONE]"],
    "two at once": ['data: {"n": 1}', f"data: {{{LAST}}}", "data: [DONE]"],
    "cut off": ['data: {"n": 1}', 'data: {"n": 2}'],
    "failed": ['data: {"n": 1}', 'data: {"error": {}}', "data: [DONE]"],
}


@pytest.fixture
def server():
    """A server that does what its key says, and what it was asked."""
    asked = []

    async def complete(request):
        body = await request.json()
        key = request.headers["authorization"].removeprefix("Bearer ")
        asked.append({**body, "key": key})
        if key.isdecimal():
            return PlainTextResponse("", int(key), headers={"Retry-After": "1"})

        async def events():
            for event in EVENTS[key]:
                yield f"{event}\n\n"

        return StreamingResponse(events())

    app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", asked
        server.should_exit = True
        thread.join()


def test_what_comes_of_a_request(server):
    url, asked = server
    keys = [*EVENTS, "429"]
    prompts = [[n, n] for n in range(len(keys))]
    with client() as process:
        answers = process.do(Job(url, "m", keys, prompts, [3] * len(prompts), streams=2))
        assert [(a.status, a.whole, a.retry_after, len(a.times)) for a in answers] == [
            (200, True, False, 4),
            (200, True, False, 4),
            (200, False, False, 3),
            (200, False, False, 4),
            (429, False, True, 1),
        ]
        # Arrivals: none waits for those before.
        due = process.do(Job(url, "m", keys[:1], prompts, [3] * len(prompts), rate=100.0, seed=1))
    starts = [answer.times[0] for answer in due]
    assert starts == sorted(starts)
    assert all(answer.whole for answer in due)
    assert sorted(found["prompt"][0] for found in asked) == sorted([*range(5), *range(5)])
    assert all(found["max_tokens"] == 3 and found["ignore_eos"] for found in asked)


def test_a_server_that_is_gone_gives_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    with client() as process:
        [answer] = process.do(Job(url, "m", ["k"], [[1]], [3], streams=1))
    assert answer == Answer(0, answer.times)


def test_growth_is_seen():
    assert _ends([9.0, 9, 5, 5, 6, 6, 6, 6, 7, 7]) == (5, 7)
