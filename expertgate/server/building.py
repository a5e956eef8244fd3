"""Whole answers with log probabilities are put together, and rendered, beside the event loop.

vLLM makes an object of each, all at the end and in one go, which every other request waited for:
twenty for each token, in many choices, are a million, and take half a minute and a gigabyte. So no
two large answers are put together at once, nor do the small ones wait for a large one, nor those of
one principal for all of another's.
"""

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.outputs import RequestOutput

from expertgate.server import answers
from expertgate.server.beside import ANSWER, Lane
from expertgate.server.grants import HANDLE_ARG
from expertgate.server.guard import GuardedLLM
from expertgate.server.turns import Turns

T = TypeVar("T")

_SMALL = 1 << 14
"""Log probabilities that are put together in a tenth of a second or two."""


class Lanes:
    """Where answers are put together, on all routes."""

    def __init__(self, engine: GuardedLLM) -> None:
        self._engine = engine
        self._small, self._large = Lane(), Lane()
        self._turns = Turns(1)
        """Whose large one is next."""

    async def rendered(
        self, request: Any, build: Callable[[], Any], outputs: Iterable[RequestOutput]
    ) -> Any:
        """The JSON of the response that `build` makes of `outputs`, or vLLM's ErrorResponse.

        Raises UnavailableError where the server cuts off what still runs.
        """
        count = sum(map(_logprobs, outputs))
        tenant = self._engine.tenant_of(request.vllm_xargs[HANDLE_ARG])
        working = asyncio.ensure_future(self._in_lane(tenant, count, partial(_rendered, build)))
        cutting = asyncio.ensure_future(self._engine.cutting.wait())
        try:
            await asyncio.wait({working, cutting}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise self._engine.dead_error
            return working.result()
        finally:
            working.cancel()
            cutting.cancel()

    async def _in_lane(self, tenant: str, count: int, work: Callable[[], Any]) -> Any:
        if count <= _SMALL:
            return await self._small.run(work, ANSWER)
        async with self._turns.turn(tenant, 1, count):
            return await self._large.run(partial(_uncollected, work), ANSWER)


class _InLanes:
    """A handler of vLLM's, which is given the lanes before its own arguments."""

    def __init__(self, lanes: Lanes, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lanes = lanes


class Chat(_InLanes, OpenAIServingChat):
    """vLLM's handler of chat; whole answers with log probabilities are JSON."""

    async def chat_completion_full_generator(
        self, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> Any:
        build = partial(super().chat_completion_full_generator, request)
        if not request.logprobs:
            return await build(result_generator, *args, **kwargs)
        outputs = [output async for output in result_generator]
        whole = partial(build, _again(outputs), *args, **kwargs)
        return await self._lanes.rendered(request, partial(_finished, whole), outputs)


@dataclass(frozen=True, slots=True)
class _Unbuilt:
    """In place of a response: what it is made of, and how."""

    outputs: Sequence[RequestOutput]
    build: Callable[[], Any]


class Completion(_InLanes, OpenAIServingCompletion):
    """vLLM's handler of plain completions; whole answers with log probabilities are JSON."""

    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        answer = await super().create_completion(request, raw_request)
        if not isinstance(answer, _Unbuilt):
            return answer
        return await self._lanes.rendered(request, answer.build, answer.outputs)

    def request_output_to_completion_response(self, outputs: Any, request: Any, *args: Any) -> Any:
        build = partial(super().request_output_to_completion_response, outputs, request, *args)
        return build() if request.logprobs is None else _Unbuilt(outputs, build)


class Responses(_InLanes, OpenAIServingResponses):
    """vLLM's handler of responses; whole answers with log probabilities are JSON."""

    async def responses_full_generator(
        self, request: Any, params: Any, result_generator: AsyncIterator[Any], *args: Any, **kw: Any
    ) -> Any:
        build = partial(super().responses_full_generator, request, params)
        if request.stream or not request.is_include_output_logprobs():
            return await build(result_generator, *args, **kw)
        contexts = [context async for context in result_generator]
        whole = partial(build, _again(contexts), *args, **kw)
        outputs = [context.last_output for context in contexts if context.last_output]
        return await self._lanes.rendered(request, partial(_finished, whole), outputs)


def _logprobs(output: RequestOutput) -> int:
    """How many are in it: each token has as many as the others."""
    return sum(
        len(choice.logprobs) * len(choice.logprobs[0])
        for choice in output.outputs
        if choice.logprobs
    )


async def _again(outputs: list[T]) -> AsyncGenerator[T, None]:
    for output in outputs:
        yield output


def _uncollected(work: Callable[[], T]) -> T:
    """What `work` makes without garbage being looked for among its million objects.

    Each time that would hold up everybody for more than a second; there is no garbage.
    """
    gc.disable()
    try:
        return work()
    finally:
        gc.enable()


def _rendered(build: Callable[[], Any]) -> Any:
    response = build()
    return response if isinstance(response, ErrorResponse) else answers.rendered(response)


def _finished(build: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What `build` comes to; there must be nothing that it waits for."""
    response = build()
    try:
        response.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    response.close()
    raise RuntimeError("vLLM waits for something while it builds an answer")
