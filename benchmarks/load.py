"""Asks a server over HTTP from a process of its own: `python -m benchmarks.load`.

Reads a `Job` as JSON from each line on stdin and answers with one line of JSON, the `Answer` of
each request. Times are of the machine's clock. One event of a stream is one token; where several
tokens came in one event, those that are missing stand at its last time.
"""

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import aiohttp

HUNG_S = 120.0
"""A request that takes longer than this hangs."""


@dataclass(frozen=True)
class Job:
    """Completions of given lengths, streamed, greedy. The keys take turns.

    Either so many `streams`, each of which asks again when it has its answer, or arrivals at a
    `rate` a second, whatever becomes of those before (Poisson, from `seed`).
    """

    url: str
    model: str
    keys: list[str]
    prompts: list[list[int]]
    output_tokens: list[int]
    """Of each prompt's answer."""
    streams: int | None = None
    rate: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """`status`: HTTP's, 0 where there was none in time; `whole`: every token came, and the end."""

    status: int
    times: list[float]
    """When it was asked, or should have been; then when each token came. In seconds."""
    whole: bool = False
    retry_after: bool = False


class Client:
    """The process that asks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def do(self, job: Job) -> list[Answer]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asdict(job)), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the client ended; its words are above")
        return [Answer(**found) for found in json.loads(line)]


@contextlib.contextmanager
def client() -> Iterator[Client]:
    command = [sys.executable, "-m", "benchmarks.load"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Client(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()  # no more jobs: it ends


async def _do(job: Job) -> list[Answer]:
    limits = aiohttp.ClientTimeout(total=HUNG_S)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=limits
    ) as session:
        if job.rate is not None:
            return await asyncio.gather(
                *(
                    _ask(session, job, place, due)
                    for place, due in enumerate(_arrivals(len(job.prompts), job.rate, job.seed))
                )
            )
        found: list[Answer | None] = [None] * len(job.prompts)
        left = iter(range(len(job.prompts)))

        async def stream() -> None:
            for place in left:
                found[place] = await _ask(session, job, place, time.time())

        await asyncio.gather(*(stream() for _ in range(job.streams or 1)))
        return [answer for answer in found if answer is not None]


def _arrivals(count: int, rate: float, seed: int) -> Sequence[float]:
    dice = random.Random(seed)
    due, times = time.time(), []
    for _ in range(count):
        due += dice.expovariate(rate)
        times.append(due)
    return times


async def _ask(session: aiohttp.ClientSession, job: Job, place: int, due: float) -> Answer:
    await asyncio.sleep(max(0.0, due - time.time()))
    length = job.output_tokens[place]
    body = {
        "model": job.model,
        "prompt": job.prompts[place],
        "max_tokens": length,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    headers = {"Authorization": f"Bearer {job.keys[place % len(job.keys)]}"}
    times, last, line = [due], b"", b""
    try:
        async with session.post(
            f"{job.url}/v1/completions", json=body, headers=headers
        ) as response:
            if response.status != 200:
                return Answer(response.status, times, retry_after="Retry-After" in response.headers)
            async for line in response.content:
                if line.startswith(b"data: {"):
                    times.append(time.time())
                    last = line
                elif line.startswith(b"data: [DONE]"):
                    whole = b'"finish_reason":"length"' in last
                    times += times[-1:] * (1 + length - len(times))
                    return Answer(200, times, whole)
            return Answer(200, times)
    except (TimeoutError, aiohttp.ClientError):
        return Answer(0, times)


def main() -> None:
    for line in sys.stdin:
        answers = asyncio.run(_do(Job(**json.loads(line))))
        print(json.dumps([asdict(answer) for answer in answers]), flush=True)


if __name__ == "__main__":
    main()
