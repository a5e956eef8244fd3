"""What the routes share: who may ask, what may be consulted, and the engine once it is ready."""

from dataclasses import dataclass, field

from expertgate.model.catalogue import Catalogue
from expertgate.policies.cedar import PolicySet
from expertgate.policies.context import Context
from expertgate.policies.decision import Decision
from expertgate.policies.principal import Principal
from expertgate.server.errors import ApiError
from expertgate.server.grants import Grants
from expertgate.server.guard import GuardedLLM
from expertgate.server.handlers import Handlers
from expertgate.server.identity import Identity


@dataclass(slots=True)
class Service:
    catalogue: Catalogue
    identity: Identity
    policies: PolicySet
    grants: Grants = field(default_factory=Grants)
    engine: GuardedLLM | None = None
    """Set once the engine has proved itself; until then nothing can be asked of it."""
    handlers: Handlers | None = None

    @property
    def ready(self) -> bool:
        return self.engine is not None and self.handlers is not None and not self.engine.errored

    def running(self) -> tuple[GuardedLLM, Handlers]:
        """Raises ApiError 503 where the engine is starting, going down or dead."""
        if self.engine is None or self.handlers is None:
            raise ApiError(503, "engine_unavailable", "the engine is starting")
        if self.engine.errored:
            raise ApiError(503, "engine_unavailable", str(self.engine.dead_error))
        return self.engine, self.handlers

    def decide(self, principal: Principal, context: Context) -> Decision:
        """What this principal may consult in this context."""
        return self.policies.decide(principal, context)
