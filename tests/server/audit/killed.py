"""`python -m tests.server.audit.killed FOLDER KILLS SEED`: a server under load, killed many times.

The application, guard, grants and log are the real ones; the engine notes the request of each call
that it gets, before it makes a token. Every life is a fork of this process, which has imported all
that a server needs, and goes on with the log that the one before it left.
"""

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

import httpx

from expertgate.server.app import create_app
from tests.server.audit.application import BODY, service_of
from tests.server.audit.logs import open_log
from tests.server.fakes import FakeEngine

CLIENTS = 4
MOST_CALLS = 6
"""A life ends at a random moment after so many calls of the engine, or fewer."""
LAST_MOMENT_S = 0.005


class NotingEngine(FakeEngine):
    def __init__(self, path: Path, called: int) -> None:
        super().__init__()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._called = called

    async def generate(self, prompt, params, request_id, **rest):
        # One write, which the kernel keeps when the process dies.
        os.write(self._file, bytes(prompt["prompt_token_ids"]).hex().encode() + b"\n")
        os.write(self._called, b".")
        async for output in super().generate(prompt, params, request_id, **rest):
            yield output


async def serve(folder: Path, called: int) -> None:
    log = open_log(folder, rotate_bytes=50_000, sign_every=20)
    service = service_of(log, NotingEngine(folder / "generated", called))
    service.audit.start("toy", "v" * 64)
    transport = httpx.ASGITransport(create_app(service))

    async def client():
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as http:
            while True:
                answer = await http.post(
                    "/v1/chat/completions", json=BODY, headers={"user": "alice"}
                )
                assert answer.status_code == 200, answer.text

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


def live_and_die(folder: Path, calls: int, rest_s: float) -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            asyncio.run(serve(folder, write))
        finally:
            os._exit(1)
    os.close(write)
    while calls > 0:
        dots = os.read(read, calls)
        assert dots, "the server ended before it was killed"
        calls -= len(dots)
    time.sleep(rest_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)


def main(folder: Path, kills: int, seed: int) -> None:
    times = random.Random(seed)
    for _ in range(kills):
        live_and_die(folder, times.randint(0, MOST_CALLS), times.uniform(0, LAST_MOMENT_S))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
