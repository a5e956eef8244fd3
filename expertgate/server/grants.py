"""The grant of one HTTP request: which experts its engine calls may consult, and for whom.

The server writes a grant's random handle into that request's own sampling parameters, and the
guarded engine redeems it there. Nothing travels by context variable: uvicorn hands those on to
the next request of a connection, and a stream runs on after the code that set them has returned.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from types import TracebackType
from typing import Self

from starlette.requests import HTTPConnection

from expertgate.model.usage import Usage
from expertgate.policies.context import Context
from expertgate.policies.decision import Decision
from expertgate.policies.expert_set import ExpertSet
from expertgate.policies.principal import Principal
from expertgate.server.audit.writer import Recorded

HANDLE_ARG = "expertgate_grant"
"""The key of `SamplingParams.extra_args` that carries a handle. No schema lets a client set it."""

_WITHDRAWN = "an expert that this request uses is no longer granted to you"


class GrantError(RuntimeError):
    """An engine call that shows no handle, or one that is closed or was never issued."""


class WithdrawnError(RuntimeError):
    """What a request was permitted when it began is permitted no longer."""


@dataclass(frozen=True, slots=True)
class Basis:
    """What a grant was given upon, kept so that the same can be asked again while it is open."""

    connection: HTTPConnection
    """Its headers are the credential."""
    principal: Principal
    context: Context
    decision: Decision

    @property
    def request_id(self) -> str | None:
        """By which the request is known in the audit log."""
        return getattr(self.connection.state, "request_id", None)


@dataclass(slots=True)
class Tally:
    """The tokens of one engine call: of its prompt, and those that each choice has brought."""

    prompt: int
    choices: int
    generated: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Grant:
    """Open from when the request is permitted until its response has ended.

    `running` holds the engine's ids of the calls that are under way on this grant: several, where
    a request has several prompts; `granted` counts them, begun or not, `prompt_logprobs` what they
    ask for in all, and `tallies` are of those that have begun. `told` holds the usage of those that
    have ended; `telling` asks for it. `basis` is missing where the server asks by itself.
    `recorded`: how the audit log holds the request; None until it is on disk or waived, and no
    engine call runs before that. `prompts`: SHA-256 of the token ids of each prompt that the
    engine was given; `finish_reasons` by call and choice.
    """

    experts: ExpertSet
    tenant: str
    handle: str
    registry: "Grants"
    spend: Callable[[int], None] = lambda _: None
    running: set[str] = field(default_factory=set)
    calls: int = 0
    granted: int = 0
    prompt_logprobs: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    telling: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    told: list[Usage] = field(default_factory=list)
    basis: Basis | None = None
    recorded: Recorded | None = None
    prompts: list[bytes] = field(default_factory=list)
    finish_reasons: dict[tuple[str, int], str] = field(default_factory=dict)
    withdrawn: bool = False
    _limit: asyncio.Timeout | None = field(default=None, init=False)

    @property
    def open(self) -> bool:
        return self.registry.holds(self) and not self.withdrawn

    def withdraw(self) -> None:
        """Ends what runs on it: calls of the engine, and whatever is inside `while_given`."""
        if self.withdrawn:
            return
        self.withdrawn = True
        if self._limit is not None:
            self._limit.reschedule(0)

    @asynccontextmanager
    async def while_given(self) -> AsyncGenerator[None, None]:
        """Ends what is inside as soon as the grant is withdrawn, whatever it waits for.

        Raises WithdrawnError in place of anything else once it was: what was inside may have made
        an answer, or an error of its own, of being ended.
        """
        try:
            if not self.withdrawn:
                async with asyncio.timeout(None) as self._limit:
                    yield
        except Exception:
            if not self.withdrawn:
                raise
        finally:
            self._limit = None
        if self.withdrawn:
            raise WithdrawnError(_WITHDRAWN)

    def check(self) -> None:
        """Raises WithdrawnError, or GrantError where the request has ended, or is not on record."""
        if self.withdrawn:
            raise WithdrawnError(_WITHDRAWN)
        if not self.registry.holds(self):
            raise GrantError("an engine call on a grant that is closed")
        if self.recorded is None:
            raise GrantError("an engine call for a request that is not on record")

    @property
    def usage(self) -> Usage | None:
        """The usage of all calls together, from when the last of them has ended.

        None before; also where nothing ran, or the engine died before it could tell.
        """
        return reduce(add, self.told) if len(self.told) == self.granted > 0 else None

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

    def __iter__(self) -> Iterator[Grant]:
        return iter(list(self._open.values()))

    def issue(
        self,
        experts: ExpertSet,
        tenant: str,
        basis: Basis | None = None,
        recorded: Recorded | None = None,
    ) -> Grant:
        """Raises ValueError for a set without experts: there is nothing to run."""
        if not experts:
            raise ValueError("a grant needs at least one expert")
        grant = Grant(experts, tenant, secrets.token_hex(16), self, basis=basis, recorded=recorded)
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
