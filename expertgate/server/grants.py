"""The grant of one HTTP request: which experts its engine calls may consult, and for whom.

The server writes a grant's random handle into that request's own sampling parameters, and the
guarded engine redeems it there. Nothing travels by context variable: uvicorn hands those on to
the next request of a connection, and a stream runs on after the code that set them has returned.
"""

import secrets
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from expertgate.model.usage import Usage
from expertgate.policies.expert_set import ExpertSet

HANDLE_ARG = "expertgate_grant"
"""The key of `SamplingParams.extra_args` that carries a handle. No schema lets a client set it."""


class GrantError(RuntimeError):
    """An engine call that shows no handle, or one that is closed or was never issued."""


@dataclass(slots=True, eq=False)
class Grant:
    """Open from when the request is permitted until its response has ended.

    `running` holds the engine's ids of the calls that are under way on this grant: several, where
    a request has several prompts. `usage` is there once the request has ended; not where nothing
    ran, or where the engine died before it could tell.
    """

    experts: ExpertSet
    tenant: str
    handle: str
    registry: "Grants"
    running: set[str] = field(default_factory=set)
    calls: int = 0
    usage: Usage | None = None

    @property
    def open(self) -> bool:
        return self.registry.holds(self)

    def next_call_id(self) -> str:
        """An id for the engine that no client chose and no other call has."""
        self.calls += 1
        # Not the handle itself: ids are logged, handles are secrets.
        return f"{secrets.token_hex(8)}-{self.calls}"

    def close(self) -> None:
        self.registry.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Grants:
    """The open grants by handle. A handle is 128 random bits, used once and then forgotten."""

    def __init__(self) -> None:
        self._open: dict[str, Grant] = {}

    def __len__(self) -> int:
        return len(self._open)

    def issue(self, experts: ExpertSet, tenant: str) -> Grant:
        """Raises ValueError for a set without experts: there is nothing to run."""
        if not experts:
            raise ValueError("a grant needs at least one expert")
        grant = Grant(experts, tenant, secrets.token_hex(16), self)
        self._open[grant.handle] = grant
        return grant

    def redeem(self, handle: object) -> Grant:
        """The open grant of this handle. Raises GrantError."""
        if not isinstance(handle, str):
            raise GrantError("an engine call without a grant")
        try:
            return self._open[handle]
        except KeyError:
            raise GrantError("an engine call on a grant that is closed or foreign") from None

    def holds(self, grant: Grant) -> bool:
        return self._open.get(grant.handle) is grant

    def close(self, grant: Grant) -> None:
        if self.holds(grant):
            del self._open[grant.handle]
