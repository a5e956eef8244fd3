"""The routes that generate: chat, plain completions and responses.

The order is the same for all: who asks, is there room, what is asked, which experts, may they; and
only then is there a grant, without which the engine runs nothing.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from opentelemetry.trace import Span
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from expertgate.model.catalogue import Catalogue
from expertgate.server import answers, responses, schemas, tracing
from expertgate.server.admission import Visit
from expertgate.server.audit.entry import CLIENT_GONE, Entry
from expertgate.server.circumstances import context_of
from expertgate.server.errors import ApiError, bad_request, withdrawn
from expertgate.server.grants import HANDLE_ARG, Grant, WithdrawnError
from expertgate.server.guard import GuardedLLM
from expertgate.server.handlers import Handlers
from expertgate.server.metrics import REQUESTS
from expertgate.server.presence import ClientGone, while_there
from expertgate.server.reading import read_body
from expertgate.server.responses import ResponsesRequest
from expertgate.server.schemas import RECEIPT_HEADER, Body, ChatRequest, TextRequest
from expertgate.server.selection import select
from expertgate.server.service import Service
from expertgate.server.slips import refuse_slip

_PIECE = 1 << 16
"""Bytes of a whole answer."""


async def chat(request: Request) -> Response:
    return await _generate(request, ChatRequest, lambda h: h.chat.create_chat_completion)


async def completions(request: Request) -> Response:
    return await _generate(request, TextRequest, lambda h: h.completion.create_completion)


async def respond(request: Request) -> Response:
    return await _generate(
        request, ResponsesRequest, lambda h: partial(responses.create, h.responses)
    )


async def _generate(
    request: Request, kind: type[Body], handler: Callable[[Handlers], Callable[..., Any]]
) -> Response:
    service: Service = request.app.state.service
    with tracing.span("identity"):
        # A refusal's record will name them.
        request.state.principal = await service.identity.identify(request)
    service.running()
    visit = service.admission.enter(request.state.principal)  # before a body is read, which costs
    response: Response | None = None
    try:
        response = await _answer(request, service, visit, kind, handler)
        return response
    finally:
        if not isinstance(response, _GrantedStream):  # which leaves when it has ended
            visit.leave()


async def _answer(
    request: Request,
    service: Service,
    visit: Visit,
    kind: type[Body],
    handler: Callable[[Handlers], Callable[..., Any]],
) -> Response:
    body: Any = schemas.read(kind, await read_body(request))
    visit.take(schemas.choices(body))
    engine, handlers = service.running()
    selection = select(body, request.headers, handlers.model_name)
    wants_receipt = _wants_receipt(body, request, service)
    grant = await service.permit(request, context_of(request, body.purpose), selection)
    grant.spend = visit.spend
    body.model = handlers.model_name
    # Nothing is awaited until the run is there, which ends what was granted.
    run = _bind(body, request, service, engine, grant)
    try:
        result = await _call_handler(run, request, lambda: handler(handlers)(body))
    except ApiError as error:
        error.param = _field(error, kind)
        raise
    return await _response(result, body, run, visit, receipt=wants_receipt)


def _field(error: ApiError, kind: type[Body]) -> str | None:
    """The one that an error is about, by its name in such a body."""
    if error.param in answers.PROMPT:
        return kind.required
    if error.param == "logprobs" and "top_logprobs" in kind.fields:
        return "top_logprobs"
    first = error.message.partition(" ")[0]  # vLLM begins with it where it says no parameter
    return first if error.param is None and first in kind.fields else error.param


def _wants_receipt(body: Any, request: Request, service: Service) -> bool:
    """Raises ApiError 400 for a header that says something else or is misspelt, or in vain."""
    refuse_slip(RECEIPT_HEADER, request.headers)
    said = request.headers.getlist(RECEIPT_HEADER)
    if said not in ([], ["1"]):
        raise bad_request(f"header {RECEIPT_HEADER} must be 1, once", RECEIPT_HEADER)
    wanted = bool(said) or body.receipt is True
    if wanted and service.audit.receipts is None:
        raise bad_request("this server keeps no audit log, and so gives no receipts", "receipt")
    return wanted


@dataclass(slots=True)
class _Run:
    """A request that was permitted, and all that there is to end of it."""

    engine: GuardedLLM
    grant: Grant
    catalogue: Catalogue
    """That by which it was permitted."""
    entry: Entry
    facts: dict[str, Any]
    """Of its line in the log."""
    span: Span

    @property
    def headers(self) -> dict[str, str]:
        """Of its response."""
        return {"X-Experts-Effective": ",".join(self.catalogue.names(self.grant.experts))}

    def experts(self) -> dict[str, Any]:
        """The `experts` object of its response; the usage is in it once all is done."""
        return answers.experts(self.catalogue, self.grant)

    def streamed(self, code: str | None) -> None:
        """Its stream has ended: whole, or with an error of this code."""
        self.entry.ended(200, code)
        if code is not None:
            self.facts["code"] = code

    async def end(self, status: int | None = None, code: str | None = None) -> None:
        """Again, it goes on where it was cut off. `status`, `code`: of the result, where known."""
        if self.span.is_recording():
            self.span.end()
        await self.engine.end(self.grant)
        if status is not None:
            self.entry.ended(status, code)
        self.entry.close()


def _bind(body: Any, request: Request, service: Service, engine: GuardedLLM, grant: Grant) -> _Run:
    """Ties body, audit entry, log line and span of a request to its grant."""
    request_id = request.state.request_id
    body.request_id = f"resp_{request_id}" if isinstance(body, ResponsesRequest) else request_id
    catalogue = service.catalogue
    entry = service.audit.entry(request_id, request.scope["path"], grant, catalogue)
    request.state.entry = entry
    # The client's own is refused by the schema, so this is the only way in for a handle.
    body.vllm_xargs = {HANDLE_ARG: grant.handle}
    names = catalogue.names(grant.experts)
    request.state.facts.update(
        principal=grant.tenant, experts=",".join(names), response=body.request_id
    )
    span = tracing.begin("engine", {tracing.EXPERTS: names})
    return _Run(engine, grant, catalogue, entry, request.state.facts, span)


async def _call_handler(run: _Run, request: Request, call: Callable[[], Awaitable[Any]]) -> Any:
    """What the handler's `call` gives back as `_first` has it; None where the client has left.

    The request is on record before that. Where this raises, the run has ended.
    """
    result: Any = None
    try:
        async with run.grant.while_given():
            with tracing.span("audit"):
                await run.entry.begin()
            REQUESTS.labels(len(run.grant.experts)).inc()
            with suppress(ClientGone):
                async with while_there(request.receive):
                    result = await _first(call())
    except Exception as error:
        shown = answers.from_exception(error)
        failure = shown or answers.internal_error()
        await run.end(failure.status, failure.code)
        if shown is None:
            raise
        raise shown from None
    except BaseException:
        # At the end of a server that waits for nothing any more, it isn't the client that has left.
        await run.end(*((503, "engine_unavailable") if run.engine.errored else ()))
        raise
    return result


@dataclass(slots=True)
class _Stream:
    """A stream whose first event has been seen, and is no error."""

    first: str
    rest: AsyncGenerator[str, None]


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


async def _response(result: Any, body: Any, run: _Run, visit: Visit, *, receipt: bool) -> Response:
    """Ends the run, or leaves that to the stream that it is answered with."""
    if isinstance(result, _Stream):
        events = _tracked(run, _events(body, result, run), receipt=receipt)
        ending = responses.ending if isinstance(body, ResponsesRequest) else answers.ending
        return _GrantedStream(events, ending, run, visit)
    if result is None:
        await run.end()
        return Response(status_code=CLIENT_GONE)
    await run.end(200)
    more: dict[str, Any] = {"experts": run.experts()}
    if receipt:
        more["receipt"] = await run.entry.receipt()
    text = result if isinstance(result, bytes) else answers.rendered(result)
    answer = answers.with_more(text, more)
    return _Whole(answer, media_type="application/json", headers=run.headers)


def _events(body: Any, stream: _Stream, run: _Run) -> AsyncGenerator[str, None]:
    """The events of a stream, with the experts that spoke."""
    if isinstance(body, ResponsesRequest):
        return responses.events(stream.first, stream.rest, run.experts)
    options = body.stream_options
    totals = bool(options and options.include_usage)
    return answers.events(stream.first, stream.rest, run.experts, totals=totals)


async def _tracked(
    run: _Run, events: AsyncGenerator[str, None], *, receipt: bool
) -> AsyncGenerator[str, None]:
    """The events of a stream; the run learns from them how it ended.

    Where a receipt is wanted, the request ends before the last event, which brings it.
    """
    code, last = None, ""
    try:
        async with aclosing(events):
            async for event in events:
                code = answers.error_code(event) or code
                if code is not None or answers.is_last(event):
                    run.streamed(code)
                if receipt and answers.is_last(event):
                    await run.end()
                    signed = await run.entry.receipt()
                    if event == answers.DONE:
                        yield answers.receipt_event(last, signed)
                    else:
                        event = responses.with_receipt(event, signed)
                last = event
                yield event
    except Exception:
        run.streamed(answers.internal_error().code)
        raise


class _Whole(Response):
    """Sent in pieces: a client is cut off that leaves one unread for long, however large it is."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        body = memoryview(self.body)
        for begin in range(0, len(body), _PIECE):
            part = bytes(body[begin : begin + _PIECE])
            more = begin + _PIECE < len(body)
            await send({"type": "http.response.body", "body": part, "more_body": more})


class _GrantedStream(StreamingResponse):
    """Ends its grant when it has ended, however it ends: whole, cut off or failed."""

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        ending: Callable[[ApiError, int], bytes],
        run: _Run,
        visit: Visit,
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=run.headers)
        self._events = events
        self._ending = ending
        self._run = run
        self._visit = visit

    async def stream_response(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        last = b""
        sent = 0
        try:
            async with self._run.grant.while_given():
                async for event in self._events:
                    if self._run.grant.withdrawn:  # vLLM may make an event of being ended
                        break
                    part = {"body": event.encode(), "more_body": True}
                    await send({"type": "http.response.body", **part})
                    sent += event.count("\n\n")  # an event has no other line breaks in a row
        except WithdrawnError as error:
            await self._events.aclose()  # now: a client that doesn't read holds up what is sent
            shown = withdrawn(error)
            self._run.streamed(shown.code)
            last = self._ending(shown, sent)
        await send({"type": "http.response.body", "body": last})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        try:
            with suppress(ClientGone):
                async with while_there(receive):
                    await self.stream_response(send)
        finally:
            try:
                await self._events.aclose()
                await self._run.end()
            finally:
                self._visit.leave()
