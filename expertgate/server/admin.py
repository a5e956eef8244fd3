"""What only operators may see and do, on a listener of its own: metrics, and suspending experts."""

import hmac
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import expertgate
from expertgate.policies.principal import Principal
from expertgate.server import app as public
from expertgate.server import metrics
from expertgate.server.bearer import bearer_token
from expertgate.server.errors import ApiError, invalid_credential
from expertgate.server.oversight import Oversight
from expertgate.server.routes import about
from expertgate.server.service import Service
from expertgate.server.suspensions import SuspensionError

_OPERATOR = Principal("operator", via="admin")
"""Whoever asks here, with the right token or a wrong one: no policy sees it, the audit log does."""


def create_admin(service: Service, oversight: Oversight, token: str) -> FastAPI:
    """The operators' application; all of it but `/health` asks for the token."""
    oversight.listeners.append(metrics.count_change)
    metrics.tell_policies(service.policies.version)
    if service.audit.log is not None:
        metrics.watch_audit(service.audit.log)
    app = FastAPI(
        title="expertgate, for operators",
        version=expertgate.__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service

    def guarded(
        endpoint: Callable[[Request], Awaitable[Response]],
    ) -> Callable[[Request], Awaitable[Response]]:
        async def asked(request: Request) -> Response:
            request.state.principal = _OPERATOR
            given = bearer_token(request.headers)
            if not hmac.compare_digest(given.encode(), token.encode()):
                raise invalid_credential("send the operators' token: 'Authorization: Bearer ...'")
            return await endpoint(request)

        return asked

    async def suspend(request: Request) -> Response:
        name = _expert(request, service)
        with _suspension_errors():
            return _changed(name, suspended=True, changed=await oversight.suspend(name))

    async def resume(request: Request) -> Response:
        name = _expert(request, service)
        with _suspension_errors():
            return _changed(name, suspended=False, changed=await oversight.resume(name))

    for path, change in (("suspend", suspend), ("resume", resume)):
        app.add_api_route(
            f"/admin/experts/{{name}}/{path}",
            guarded(change),
            methods=["POST"],
            response_model=None,
        )
    app.add_api_route("/health", about.health, methods=["GET", "HEAD"], response_model=None)
    app.add_api_route("/metrics", guarded(scrape), methods=["GET"], response_model=None)
    public.show_errors(app)
    return app


@contextmanager
def _suspension_errors() -> Iterator[None]:
    """An operator has to know that it is not so, and may know which file is why."""
    try:
        yield
    except SuspensionError as error:
        raise ApiError(503, "suspension_failed", f"this is not in force: {error}") from None


def _expert(request: Request, service: Service) -> str:
    name = str(request.path_params["name"])
    if service.catalogue.index(name) is None:
        known = ", ".join(service.catalogue.names(service.catalogue.all))
        raise ApiError(404, "not_found", f"there is no such expert, only {known}", "name")
    return name


def _changed(name: str, *, suspended: bool, changed: bool) -> JSONResponse:
    return JSONResponse({"expert": name, "suspended": suspended, "changed": changed})


async def scrape(_: Request) -> Response:
    """The metrics of vLLM, as it names them, and ours."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
