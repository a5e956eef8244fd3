"""The grant of one HTTP request: which experts its engine calls may consult, and for whom.

The server writes a grant's random handle into that request's own sampling parameters, and the
guarded engine redeems it there. Nothing travels by context variable: uvicorn hands those on to
the next request of a connection, and a stream runs on after the code that set them has returned.
"""

import asyncio
import hashlib
import secrets
from array import array
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import add
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
    """What policies said of it last."""

    @property
    def request_id(self) -> str | None:
        """By which the request is known in the audit log."""
        return getattr(self.connection.state, "request_id", None)


@dataclass(slots=True, eq=False)
class Call:
    """One call of the engine under a grant, and what is known of it so far."""

    id: str
    """The engine's id. No client chose it, and no other call has it."""
    prompt_tokens: int
    prompt_digest: bytes
    """SHA-256 of the prompt's token ids, each a native 32-bit integer."""
    choices: int
    """How many completions it samples (OpenAI's `n`)."""
    generated: dict[int, int] = field(default_factory=dict)
    """Tokens that each choice has brought so far, by the choice's index."""
    finish_reasons: dict[int, str] = field(default_factory=dict)
    """By the index of each choice that has finished."""
    report: asyncio.Task[None] | None = None
    """Fetches the usage from the workers; started once, when the call has ended."""
    usage: Usage | None = None
    """Set by `report`; stays None where the engine dies first."""


@dataclass(slots=True, eq=False)
class Grant:
    """Open from when the request is permitted until its response has ended."""

    experts: ExpertSet
    tenant: str
    handle: str
    registry: "Grants"
    basis: Basis | None = None
    """None for the server's own probes."""
    recorded: Recorded | None = None
    """How the audit log holds the request. Until it is on disk or waived, no engine call runs."""
    spend: Callable[[int], None] = lambda _: None
    """Is given each number of tokens that the request uses, of prompts and of answers."""
    calls: list[Call] = field(default_factory=list)
    """The engine calls that have begun; several, where a request has several prompts."""
    calls_expected: int = 0
    """Engine calls asked for, whether they have begun or wait for their turn."""
    logprobs: int = 0
    """Log probabilities that these ask for, all together, as far as they come in one step."""
    held_logprobs: int = 0
    """The others, which come token by token."""
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

        None before; also where nothing ran, or the engine died before it could report.
        """
        found = [call.usage for call in self.calls if call.usage is not None]
        return reduce(add, found) if len(found) == self.calls_expected > 0 else None

    def expect_call(self, prompt_token_ids: Sequence[int], choices: int) -> Call:
        """A call that is to run on this grant; it joins `calls` when it begins."""
        self.calls_expected += 1
        return Call(
            # Not the handle itself: ids are logged, handles are secrets.
            id=f"{secrets.token_hex(8)}-{self.calls_expected}",
            prompt_tokens=len(prompt_token_ids),
            prompt_digest=hashlib.sha256(array("I", prompt_token_ids)).digest(),
            choices=choices,
        )

    def close(self) -> None:
        self.registry.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
