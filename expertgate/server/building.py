"""Whole answers with log probabilities are put together beside the event loop.

vLLM makes an object of each, all at the end and in one go, which every other request waited for:
twenty for each token, in many choices, are a million and take half a minute.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from functools import partial
from typing import Any, TypeVar

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from expertgate.server.beside import beside

T = TypeVar("T")


class Chat(OpenAIServingChat):
    """vLLM's handler of chat."""

    async def chat_completion_full_generator(
        self, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> Any:
        build = partial(super().chat_completion_full_generator, request)
        if not request.logprobs:
            return await build(result_generator, *args, **kwargs)
        outputs = [output async for output in result_generator]
        return await _built(build(_again(outputs), *args, **kwargs))


class Completion(OpenAIServingCompletion):
    """vLLM's handler of plain completions."""

    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        answer = await super().create_completion(request, raw_request)
        return await beside(answer, "answer") if isinstance(answer, partial) else answer

    def request_output_to_completion_response(self, outputs: Any, request: Any, *args: Any) -> Any:
        """A call that makes the response, where there are log probabilities in it."""
        build = partial(super().request_output_to_completion_response, outputs, request, *args)
        return build() if request.logprobs is None else build


class Responses(OpenAIServingResponses):
    """vLLM's handler of responses."""

    async def responses_full_generator(
        self, request: Any, params: Any, result_generator: AsyncIterator[Any], *args: Any, **kw: Any
    ) -> Any:
        build = partial(super().responses_full_generator, request, params)
        if request.stream or not request.is_include_output_logprobs():
            return await build(result_generator, *args, **kw)
        outputs = [output async for output in result_generator]
        return await _built(build(_again(outputs), *args, **kw))


def has_logprobs(body: Any) -> bool:
    """Whether the answer to a request will hold log probabilities of its tokens."""
    if isinstance(body, ResponsesRequest):
        return bool(body.is_include_output_logprobs())
    return body.logprobs is not None and body.logprobs is not False


async def _again(outputs: list[T]) -> AsyncGenerator[T, None]:
    for output in outputs:
        yield output


async def _built(response: Coroutine[Any, Any, T]) -> T:
    """Its result; there must be nothing that it waits for."""
    return await beside(partial(_finished, response), "answer")


def _finished(response: Coroutine[Any, Any, T]) -> T:
    try:
        response.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    response.close()
    raise RuntimeError("vLLM waits for something while it builds an answer")
