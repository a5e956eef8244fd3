"""Whole answers with log probabilities are put together, and rendered, beside the event loop.

vLLM makes an object of each, all at the end and in one go, which every other request waited for:
twenty for each token, in many choices, are a million, and take half a minute and a gigabyte. So no
two large answers are put together at once, nor do the small ones wait for a large one.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.outputs import RequestOutput

from expertgate.server import answers
from expertgate.server.beside import Lane

T = TypeVar("T")

_SMALL = 1 << 14
"""Log probabilities that are put together in some quarter of a second."""


class Lanes:
    """Where answers are put together, on all routes."""

    def __init__(self) -> None:
        self._small, self._large = Lane(), Lane()

    async def rendered(self, build: Callable[[], Any], outputs: Iterable[RequestOutput]) -> Any:
        """The JSON of the response that `build` makes of `outputs`, or vLLM's ErrorResponse."""
        count = sum(map(_logprobs, outputs))
        lane = self._small if count <= _SMALL else self._large
        return await lane.run(partial(_rendered, build), "answer")


class Chat(OpenAIServingChat):
    """vLLM's handler of chat; whole answers with log probabilities are JSON."""

    def __init__(self, lanes: Lanes, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lanes = lanes

    async def chat_completion_full_generator(
        self, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> Any:
        build = partial(super().chat_completion_full_generator, request)
        if not request.logprobs:
            return await build(result_generator, *args, **kwargs)
        outputs = [output async for output in result_generator]
        whole = partial(build, _again(outputs), *args, **kwargs)
        return await self._lanes.rendered(partial(_finished, whole), outputs)


class Completion(OpenAIServingCompletion):
    """vLLM's handler of plain completions; whole answers with log probabilities are JSON."""

    def __init__(self, lanes: Lanes, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lanes = lanes

    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        answer = await super().create_completion(request, raw_request)
        if not isinstance(answer, partial):
            return answer
        return await self._lanes.rendered(answer, answer.args[0])

    def request_output_to_completion_response(self, outputs: Any, request: Any, *args: Any) -> Any:
        """A call that makes the response, where there are log probabilities in it."""
        build = partial(super().request_output_to_completion_response, outputs, request, *args)
        return build() if request.logprobs is None else build


class Responses(OpenAIServingResponses):
    """vLLM's handler of responses; whole answers with log probabilities are JSON."""

    def __init__(self, lanes: Lanes, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lanes = lanes

    async def responses_full_generator(
        self, request: Any, params: Any, result_generator: AsyncIterator[Any], *args: Any, **kw: Any
    ) -> Any:
        build = partial(super().responses_full_generator, request, params)
        if request.stream or not request.is_include_output_logprobs():
            return await build(result_generator, *args, **kw)
        contexts = [context async for context in result_generator]
        whole = partial(build, _again(contexts), *args, **kw)
        outputs = [context.last_output for context in contexts if context.last_output]
        return await self._lanes.rendered(partial(_finished, whole), outputs)


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
