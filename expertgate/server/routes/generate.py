"""The two routes that generate: chat and plain completions.

The order is the same for both: who asks, what is asked, which experts, may they; and only then is
there a grant, without which the engine runs nothing.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from expertgate.server import answers, schemas
from expertgate.server.circumstances import context_of
from expertgate.server.errors import withdrawn
from expertgate.server.grants import HANDLE_ARG, Grant, WithdrawnError
from expertgate.server.guard import GuardedLLM
from expertgate.server.handlers import Handlers
from expertgate.server.reading import read_body
from expertgate.server.schemas import ChatRequest, TextRequest
from expertgate.server.selection import select
from expertgate.server.service import Service

Body = TypeVar("Body", ChatRequest, TextRequest)

_CLIENT_GONE = 499


async def chat(request: Request) -> Response:
    return await _generate(request, ChatRequest, lambda h: h.chat.create_chat_completion)


async def completions(request: Request) -> Response:
    return await _generate(request, TextRequest, lambda h: h.completion.create_completion)


async def _generate(
    request: Request, kind: type[Body], handler: Callable[[Handlers], Callable[..., Any]]
) -> Response:
    service: Service = request.app.state.service
    await service.identity.identify(request)  # before the body is read, which costs
    body = schemas.read(kind, await read_body(request))
    engine, handlers = service.running()
    selection = select(body, request.headers, handlers.model_name)
    grant = await service.permit(request, context_of(request, body.purpose), selection)
    told = {"effective": service.catalogue.names(grant.experts)}
    body.model = handlers.model_name
    body.request_id = uuid.uuid4().hex
    # The client's own is refused by the schema, so this is the only way in for a handle.
    body.vllm_xargs = {HANDLE_ARG: grant.handle}
    headers = {
        "X-Experts-Effective": ",".join(told["effective"]),
        "X-Request-Id": body.request_id,
    }
    try:
        async with grant.while_given():
            result = await _unless_gone(_first(handler(handlers)(body)), request)
    except BaseException as error:
        await engine.end(grant)
        shown = answers.from_exception(error) if isinstance(error, Exception) else None
        if shown is None:
            raise
        raise shown from None
    if isinstance(result, _Stream):
        options = body.stream_options
        totals = bool(options and options.include_usage)
        events = answers.events(result.chunks(), told, totals=totals)
        return _GrantedStream(events, engine, grant, headers)
    await engine.end(grant)
    if result is None:
        return Response(status_code=_CLIENT_GONE)
    return JSONResponse(answers.body(result, told), headers=headers)


@dataclass(slots=True)
class _Stream:
    """A stream whose first event has been seen, and is no error."""

    first: str
    rest: AsyncGenerator[str, None]

    async def chunks(self) -> AsyncGenerator[str, None]:
        async with aclosing(self.rest):
            yield self.first
            async for chunk in self.rest:
                yield chunk


async def _first(answer: Awaitable[Any]) -> Any:
    """What a handler gives back.

    A stream is waited for until its first event, because what is wrong with a request often shows
    only there, and an error must come before the status does. Raises what the handler raises.
    """
    result = await answer
    if isinstance(result, ErrorResponse):
        raise answers.from_response(result)
    if not isinstance(result, AsyncGenerator):
        return result
    first = await anext(result)
    error = answers.from_event(first)
    if error is not None:
        await result.aclose()
        raise error
    return _Stream(first, result)


async def _unless_gone(work: Coroutine[Any, Any, Any], request: Request) -> Any:
    """The result of `work`, or None where the client leaves before; `work` has then ended."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        gone.cancel()
        if not working.done():
            working.cancel()
            # vLLM makes an error of its own of a cancellation, and nobody is left to hear it.
            await asyncio.wait({working})
            if not working.cancelled():
                working.exception()


async def _disconnected(request: Request) -> None:
    # The body has been read, so the next message can only be this one.
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _GrantedStream(StreamingResponse):
    """Ends its grant when it has ended, however it ends: told, cut off or failed."""

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        engine: GuardedLLM,
        grant: Grant,
        headers: dict[str, str],
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._engine = engine
        self._grant = grant

    async def stream_response(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        last = b""
        try:
            async with self._grant.while_given():
                async for event in self._events:
                    if self._grant.withdrawn:  # vLLM may make an event of being ended
                        break
                    part = {"body": event.encode(), "more_body": True}
                    await send({"type": "http.response.body", **part})
        except WithdrawnError as error:
            last = answers.ending(withdrawn(error))
        await send({"type": "http.response.body", "body": last})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._engine.end(self._grant)
