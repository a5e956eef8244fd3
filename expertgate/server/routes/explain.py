"""What a request would be granted, and by which policies: for oneself, and running nothing."""

from fastapi import Request
from fastapi.responses import JSONResponse

from expertgate.policies.expert_set import ExpertSet
from expertgate.server import schemas
from expertgate.server.circumstances import context_of
from expertgate.server.errors import ApiError
from expertgate.server.reading import read_body
from expertgate.server.schemas import ExplainRequest
from expertgate.server.selection import Selection, effective, select
from expertgate.server.service import Service


async def explain(request: Request) -> JSONResponse:
    """The effective set of a selection, or the error that it would get, and what is granted.

    Of what isn't granted it says nothing that a refusal wouldn't: a name that was asked for stands
    there as denied, whether or not there is such an expert, and without the policies that deny it.
    """
    service: Service = request.app.state.service
    request.state.principal = principal = await service.identity.identify(request)
    with service.admission.enter(principal):
        body = schemas.read(ExplainRequest, await read_body(request))
        selection = select(body, request.headers, served="")
        context = context_of(request, body.purpose)
        decision = service.decide(await service.identity.identify(request), context)

    error = None
    experts = ExpertSet(0)
    try:
        experts = effective(selection, decision.granted, service.catalogue)
    except ApiError as refused:
        error = refused.body()["error"]
    granted = service.catalogue.names(decision.granted)
    verdicts = [{"name": name, "allowed": True, "by": decision.reasons[name]} for name in granted]
    verdicts += [
        {"name": name, "allowed": False, "by": []}
        for name in sorted(_asked(selection) - set(granted))
    ]
    return JSONResponse(
        {
            "object": "expert.decision",
            "policies": decision.version,
            "effective": service.catalogue.names(experts),
            "error": error,
            "experts": verdicts,
        }
    )


def _asked(selection: Selection | None) -> frozenset[str]:
    return frozenset() if selection is None else selection.names
