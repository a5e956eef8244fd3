"""What the routes share: who may ask, what may be consulted, and the engine once it is ready."""

from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from expertgate.model.catalogue import Catalogue
from expertgate.policies.cedar import PolicySet
from expertgate.policies.context import Context
from expertgate.policies.decision import Decision
from expertgate.policies.expert_set import ExpertSet
from expertgate.policies.principal import Principal
from expertgate.server.audit.trail import Trail
from expertgate.server.errors import ApiError
from expertgate.server.grants import Basis, Grant, Grants
from expertgate.server.guard import GuardedLLM
from expertgate.server.handlers import Handlers
from expertgate.server.identity import Identity
from expertgate.server.namespaces import Namespaces
from expertgate.server.selection import Selection, effective

SUSPENDED = "suspended"
"""The reason for an expert that is taken from everybody."""


@dataclass(slots=True)
class Service:
    catalogue: Catalogue
    identity: Identity
    policies: PolicySet
    audit: Trail
    suspended: ExpertSet = field(default_factory=lambda: ExpertSet(0))
    """Experts that are taken from everybody, whatever policy says."""
    grants: Grants = field(default_factory=Grants)
    namespaces: Namespaces = field(default_factory=Namespaces)
    engine: GuardedLLM | None = None
    """Set once the engine has proved itself; until then nothing can be asked of it."""
    handlers: Handlers | None = None

    @property
    def ready(self) -> bool:
        return (
            self.engine is not None
            and self.handlers is not None
            and not self.engine.errored
            and self.audit.ready
        )

    def running(self) -> tuple[GuardedLLM, Handlers]:
        """Raises ApiError 503 where the engine is starting, going down or dead."""
        if self.engine is None or self.handlers is None:
            raise ApiError(503, "engine_unavailable", "the engine is starting")
        if self.engine.errored:
            raise ApiError(503, "engine_unavailable", str(self.engine.dead_error))
        return self.engine, self.handlers

    def decide(self, principal: Principal, context: Context) -> Decision:
        """What this principal may consult in this context: what policy grants, less suspensions."""
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
        decision = self.decide(principal, context)
        experts = effective(selection, decision.granted, self.catalogue)
        self.namespaces.note(principal, context, experts)
        basis = Basis(connection, principal, context, decision)
        return self.grants.issue(experts, principal.id, basis)
