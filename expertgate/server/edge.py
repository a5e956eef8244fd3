"""The outermost layer of the application: an id for each request, and a line in the log.

A client may bring an id in `X-Request-Id`, by which it finds its request again in our log; it goes
back in the response. The engine never sees it, and two requests may share one.
"""

import logging
import re
import time
import uuid
from typing import Any

from opentelemetry.trace import SpanKind
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertgate.server import tracing
from expertgate.server.errors import ApiError, bad_request
from expertgate.server.logs import FACTS, request_id
from expertgate.server.metrics import DENIALS

HEADER = "X-Request-Id"

log = logging.getLogger("expertgate.access")

_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class Edge:
    """Routes write what the log may say of a request into `request.state.facts`.

    Who asks, where `request.state.principal` says it, stands there in any case.

    `request.state.request_id` is ours, which is in the answer's own id, in the audit log and, where
    the client brought no other, in the header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.getlist(HEADER)
        known = len(given) == 1 and _ID.fullmatch(given[0]) is not None
        ours = uuid.uuid4().hex
        own = given[0] if known else ours
        request_id.set(own)
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(facts=facts, request_id=ours)
        status = 499  # where the client has left before there is another

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = own
            await send(message)

        app: ASGIApp = self._app
        error = None
        if given and not known:
            message = f"{HEADER} must be sent once, as 1 to 128 letters, digits and . _ : / + = -"
            error = bad_request(message, HEADER)
        elif scope["path"].endswith("\n"):
            # Starlette would take it for the same path without: a pattern's $ stands there too.
            error = ApiError(404, "not_found", "there is no route that ends with a line feed")
        if error is not None:
            DENIALS.labels(error.code).inc()
            facts["code"] = error.code
            app = JSONResponse(error.body(), error.status)
        method, above = scope["method"], tracing.context_in(headers)
        try:
            with tracing.span(method, above, SpanKind.SERVER) as span:
                await app(scope, receive, sending)
                route = getattr(scope.get("route"), "path", None)
                if route is not None:
                    span.update_name(f"{method} {route}")
                    span.set_attribute("http.route", route)
                span.set_attribute("http.request.method", method)
                span.set_attribute("http.response.status_code", status)
        finally:
            took_ms = round((time.perf_counter() - began) * 1000, 1)
            who = scope["state"].get("principal")
            if who is not None:
                facts.setdefault("principal", who.id)
            extra = {FACTS: {"status": status, "took_ms": took_ms, **facts}}
            log.info("%s %s", method, _shown(scope["path"]), extra=extra)


def _shown(path: str) -> str:
    """A client's own words, so that they stay within their line, and say nothing behind a blank."""
    return path[:200].encode("unicode_escape").decode().replace(" ", r"\x20")
