"""The application: its routes, one by one, and what every error looks like."""

import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import expertgate
from expertgate.server import answers, schemas
from expertgate.server.counting import DetokenizeRequest, TokenizeChat, TokenizeText
from expertgate.server.edge import Edge
from expertgate.server.errors import ApiError
from expertgate.server.metrics import DENIALS
from expertgate.server.responses import ResponsesRequest
from expertgate.server.routes import about, counting, explain, generate
from expertgate.server.schemas import Body, ChatRequest, ExplainRequest, TextRequest
from expertgate.server.service import Service

log = logging.getLogger(__name__)

_POSTS: tuple[tuple[str, Callable[..., Any], tuple[type[Body], ...]], ...] = (
    ("/v1/chat/completions", generate.chat, (ChatRequest,)),
    ("/v1/completions", generate.completions, (TextRequest,)),
    ("/v1/responses", generate.respond, (ResponsesRequest,)),
    ("/v1/experts/explain", explain.explain, (ExplainRequest,)),
    ("/tokenize", counting.tokenize, (TokenizeText, TokenizeChat)),
    ("/detokenize", counting.detokenize, (DetokenizeRequest,)),
)
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="expertgate",
        version=expertgate.__version__,
        # Pages of scripts from elsewhere; the document itself, /openapi.json, is enough.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for path, endpoint, kinds in _POSTS:
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=None,
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _reference(*kinds)}},
                }
            },
        )
    for path, look in (
        ("/v1/models", about.models),
        ("/v1/experts", about.experts),
        ("/health", about.health),
        ("/ready", about.ready),
        ("/version", about.version),
        ("/v1/receipts/{request_id}", about.receipt),
        ("/.well-known/expertgate-keys", about.keys),
    ):
        app.add_api_route(path, look, methods=["GET"], response_model=None)

    show_errors(app)
    _describe_bodies(app)
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
            request.url.path,
            getattr(request.state, "principal", None),
            None if request.client is None else request.client.host,
            error,
        )
    return _respond(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path}: {error.detail}"
    headers = dict(error.headers) if error.headers else {}
    return _respond(ApiError(error.status_code, code, message, None, headers))


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


async def _unexpected(_: Request, __: Exception) -> Response:
    # The server logs the exception itself; the client learns nothing from it.
    return _respond(answers.internal_error())


def _respond(error: ApiError) -> Response:
    DENIALS.labels(error.code).inc()
    return JSONResponse(error.body(), error.status, headers=dict(error.headers or {}))


def _reference(*kinds: type[Any]) -> dict[str, Any]:
    found = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in kinds]
    return found[0] if len(found) == 1 else {"oneOf": found}


def _describe_bodies(app: FastAPI) -> None:
    """Adds the bodies to the OpenAPI document; the routes read them by hand, within limits."""
    without = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = without()
            known = document.setdefault("components", {}).setdefault("schemas", {})
            for kind in (kind for _, _, kinds in _POSTS for kind in kinds):
                schema = schemas.openapi(kind)
                known.update(schema.pop("$defs", {}))
                known[kind.__name__] = schema
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it
