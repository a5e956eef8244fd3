"""The application: its routes, one by one, and what every error looks like."""

import difflib
import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

import expertgate
from expertgate.server import answers
from expertgate.server.edge import Edge
from expertgate.server.errors import ApiError
from expertgate.server.metrics import DENIALS
from expertgate.server.openapi.document import document
from expertgate.server.routes.table import ROUTES
from expertgate.server.service import Service

log = logging.getLogger(__name__)

_LONGEST_SLIP = 64
"""Characters of a path in which a slip is looked for."""
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="expertgate",
        version=expertgate.__version__,
        # Its pages are of scripts from elsewhere, and it would serialise the document at each GET.
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for route in ROUTES:
        methods = ["GET", "HEAD"] if route.method == "GET" else [route.method]
        app.add_api_route(route.pattern, route.endpoint, methods=methods, response_model=None)
    described = JSONResponse(document()).body

    async def openapi(_: Request) -> Response:
        return Response(described, media_type="application/json")

    app.add_route("/openapi.json", openapi)
    show_errors(app)
    return app


def show_errors(app: FastAPI) -> None:
    """Gives every error its shape and every request its line; the last thing done to an app."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)
    # Around Starlette's own outermost layer, which answers what nobody else has.
    app.middleware_stack = Edge(app.build_middleware_stack())


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    entry = getattr(request.state, "entry", None)
    # A request that is on record has a result there, whatever became of it.
    if entry is None or not entry.begun:
        service: Service = request.app.state.service
        service.audit.refused(
            request.scope["path"],
            getattr(request.state, "principal", None),
            None if request.client is None else request.client.host,
            error,
        )
    return _respond(request, error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "invalid_request")
    headers = dict(error.headers) if error.headers else {}
    method, path = request.method, request.scope["path"]
    if error.status_code == 404:
        message = f"there is no route {path}{_hint(request.app, path)}"
    elif error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))  # it was a set
        message = f"{path} takes {headers['Allow']}, not {method}"
    else:
        message = f"{method} {path}: {error.detail}"
    return _respond(request, ApiError(error.status_code, code, message, None, headers))


def _hint(app: FastAPI, path: str) -> str:
    """Most of all for clients whose base URL lacks its /v1, or that end a path with a slash."""
    if len(path) > _LONGEST_SLIP:
        return ""
    known = [route.path for route in app.routes if isinstance(route, Route)]
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


async def _unexpected(request: Request, _: Exception) -> Response:
    # The server logs the exception itself; the client learns nothing from it.
    return _respond(request, answers.internal_error())


def _respond(request: Request, error: ApiError) -> Response:
    DENIALS.labels(error.code).inc()
    request.state.facts["code"] = error.code
    return JSONResponse(error.body(), error.status, headers=dict(error.headers or {}))
