"""What may be asked without running anything."""

import re

from fastapi import Request
from fastapi.responses import JSONResponse

import expertgate
from expertgate.server.audit.signing import jwks_of
from expertgate.server.circumstances import context_of
from expertgate.server.errors import ApiError
from expertgate.server.handlers import Handlers
from expertgate.server.selection import effective, from_model
from expertgate.server.service import Service

_OF_ANSWER = re.compile(r"^(chatcmpl-|cmpl-|resp_)")
"""What stands before a request's id in the id of its answer."""


async def health(request: Request) -> JSONResponse:
    """200 while the process can be of use; 503 once its engine has died and it must be replaced."""
    engine = _service(request).engine
    dead = engine is not None and engine.dead
    return JSONResponse({"status": "dead" if dead else "ok"}, 503 if dead else 200)


async def ready(request: Request) -> JSONResponse:
    """200 once the engine has proved itself, and while it answers; else 503, and why."""
    why = _service(request).unready
    if why is None:
        return JSONResponse({"ready": True})
    return JSONResponse({"ready": False, "why": why}, 503)


async def version(_: Request) -> JSONResponse:
    return JSONResponse({"version": expertgate.__version__})


async def keys(request: Request) -> JSONResponse:
    """The public keys by which the audit log can be checked, as JSON Web Keys."""
    audit_log = _service(request).audit.log
    return JSONResponse({"keys": []} if audit_log is None else jwks_of(audit_log.key))


async def receipt(request: Request) -> JSONResponse:
    """That of a request of the caller's own which has ended lately."""
    service = _service(request)
    request.state.principal = principal = await service.identity.identify(request)
    if service.audit.receipts is None:
        raise ApiError(404, "not_found", "this server keeps no audit log, and so gives no receipts")
    answer_id: str = request.path_params["request_id"]
    found = await service.audit.receipts.of(_OF_ANSWER.sub("", answer_id), principal)
    return JSONResponse({"object": "receipt", "receipt": found})


async def models(request: Request) -> JSONResponse:
    service = _service(request)
    request.state.principal = await service.identity.identify(request)
    _, handlers = service.running()
    return JSONResponse({"object": "list", "data": [_card(handlers, handlers.model_name)]})


async def model(request: Request) -> JSONResponse:
    """The model, or an alias of it for experts that the caller is granted."""
    service = _service(request)
    request.state.principal = principal = await service.identity.identify(request)
    _, handlers = service.running()
    name: str = request.path_params["model"]
    selection = from_model(name, handlers.model_name)
    if selection is not None:
        granted = service.decide(principal, context_of(request)).granted
        effective(selection, granted, service.catalogue)
    return JSONResponse(_card(handlers, name))


def _card(handlers: Handlers, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": handlers.created,
        "owned_by": "expertgate",
        "max_model_len": handlers.max_model_len,
    }


async def experts(request: Request) -> JSONResponse:
    """The catalogue, as far as the caller is granted it."""
    service = _service(request)
    request.state.principal = principal = await service.identity.identify(request)
    decision = service.decide(principal, context_of(request))
    # An index would tell how many experts there are that the caller may not know of.
    shown = [
        service.catalogue.experts[index].model_dump(mode="json", exclude={"index"})
        for index in decision.granted
    ]
    return JSONResponse({"object": "list", "data": shown})


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
