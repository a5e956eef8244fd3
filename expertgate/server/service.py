"""What the routes share: who may ask, what may be consulted, and the engine once it is ready."""

import time
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from expertgate.model.catalogue import Catalogue
from expertgate.policies.cedar import PolicySet
from expertgate.policies.context import Context
from expertgate.policies.decision import Decision
from expertgate.policies.expert_set import ExpertSet
from expertgate.policies.principal import Principal
from expertgate.server.admission import Admission
from expertgate.server.audit.trail import Trail
from expertgate.server.errors import ApiError
from expertgate.server.grants import Basis, Grant, Grants
from expertgate.server.guard import GuardedLLM
from expertgate.server.handlers import Handlers
from expertgate.server.identity import Identity
from expertgate.server.liveness import Liveness
from expertgate.server.metrics import DECISION_SECONDS
from expertgate.server.namespaces import Namespaces
from expertgate.server.selection import Selection, effective
from expertgate.server.tracing import span
from expertgate.server.turns import Turns

SUSPENDED = "suspended"
"""The reason for an expert that is taken from everybody."""
_LATE_S = 30.0
"""What takes longer to read again may not come, and without it the server is not ready."""


@dataclass(slots=True)
class Service:
    catalogue: Catalogue
    identity: Identity
    policies: PolicySet
    audit: Trail
    admission: Admission = field(default_factory=Admission)
    renders: Turns = field(default_factory=lambda: Turns(1))
    """Whose text is tokenized next."""
    suspended: ExpertSet = field(default_factory=lambda: ExpertSet(0))
    """Experts that are taken from everybody, whatever policy says."""
    grants: Grants = field(default_factory=Grants)
    namespaces: Namespaces = field(default_factory=Namespaces)
    engine: GuardedLLM | None = None
    """Set once the engine has proved itself; until then nothing can be asked of it."""
    handlers: Handlers | None = None
    fault: str | None = None
    """What an engine failed to show, that for this takes no requests."""
    liveness: Liveness | None = None
    unwatched: str | None = None
    """What nobody looks at any more, so that changes of it would not be seen."""
    reading: list[tuple[str, float]] = field(default_factory=list)
    """What is read again at the moment, and since when by the monotonic clock."""

    @property
    def unready(self) -> str | None:
        """Why requests can't be taken, or are not likely to be answered."""
        try:
            self.running()
        except ApiError as error:
            return error.message
        if not self.audit.ready:
            return "requests can't be recorded"
        if self.unwatched is not None:
            return f"{self.unwatched} is no longer watched"
        for what, since in self.reading:
            if time.monotonic() - since > _LATE_S:
                return f"{what} have changed, and can't be read to their end"
        if self.liveness is not None and self.liveness.late:
            return "the engine does not answer"
        return None

    def running(self) -> tuple[GuardedLLM, Handlers]:
        """Raises ApiError 503 where the engine is starting, going down or dead, or has a fault."""
        if self.engine is None or self.handlers is None:
            raise _unavailable(self.fault or "the engine is starting")
        if self.engine.errored:
            raise _unavailable(str(self.engine.dead_error))
        return self.engine, self.handlers

    def decide(self, principal: Principal, context: Context) -> Decision:
        """What this principal may consult in this context: what policy grants, less suspensions."""
        with DECISION_SECONDS.time():
            decision = self.policies.decide(principal, context)
        if not decision.granted & self.suspended:
            return decision
        names = self.catalogue.names(self.suspended)
        return Decision(
            decision.granted - self.suspended,
            {**decision.reasons, **dict.fromkeys(names, (SUSPENDED,))},
            decision.version,
        )

    async def permit(
        self, connection: HTTPConnection, context: Context, selection: Selection | None
    ) -> Grant:
        """A grant of what is selected. Raises ApiError 401, 403 or 400.

        Asks who it is, though somebody has before the body was read: that takes as long as the
        client likes. Between the answer to that, the decision and the grant nothing is awaited, so
        none of the three can be out of date when the grant is there to be withdrawn.
        """
        principal = await self.identity.identify(connection)
        with span("policy"):
            decision = self.decide(principal, context)
            experts = effective(selection, decision.granted, self.catalogue)
        self.namespaces.note(principal, context, experts)
        basis = Basis(connection, principal, context, decision)
        return self.grants.issue(experts, principal.id, basis)


def _unavailable(message: str) -> ApiError:
    return ApiError(503, "engine_unavailable", message)
