"""Watches what permissions rest on, and ends requests for which they no longer hold.

Policies, catalogue, suspensions and credentials are looked at forty times a second. What changed
is put in force, and every open grant asked for again with what it was first asked with, in one step
of the event loop: at no moment is there a grant that the policies in force would not give. What new
policies say of open grants is found out before that, beside the loop, and kept with each of them.
Where credentials change, those of open grants are judged again one by one, because signatures take
time.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from expertgate.model.catalogue import Catalogue, CatalogueError
from expertgate.policies.cedar import PolicySet
from expertgate.policies.decision import Decision
from expertgate.policies.expert_set import ExpertSet
from expertgate.policies.statement import PolicyError
from expertgate.server import suspensions
from expertgate.server.beside import beside
from expertgate.server.changes import (
    Change,
    CredentialsChanged,
    PoliciesLoaded,
    PoliciesRefused,
    Resumed,
    Suspended,
    Withdrawn,
)
from expertgate.server.errors import ApiError
from expertgate.server.grants import Basis, Grant
from expertgate.server.identity import CredentialSource
from expertgate.server.names import voucher
from expertgate.server.policy_files import PolicyFiles, Stamp
from expertgate.server.service import Service
from expertgate.server.suspensions import SuspensionError
from expertgate.server.watched import stamp

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_EVERY_S = 0.025
_TOKENS_EVERY_S = 1.0
"""So often those of open requests are shown to their issuers' keys, which are then fetched."""
_SHOWN = 10
"""Credentials that a line of the log names; the audit log names all."""


class _Watch:
    """A stamp that is looked at, and tells of a change once it has stopped changing."""

    def __init__(self, look: Callable[[], object], known: object) -> None:
        self._look = look
        self._known = self._seen = known

    def changed(self) -> bool:
        """True once for each change. One that is still being written waits for another look."""
        found = self._look()
        settled = found == self._seen
        self._seen = found
        if not settled or found == self._known:
            return False
        self._known = found
        return True

    def still(self) -> bool:
        return self._look() == self._seen

    def again(self) -> None:
        """The next look finds a change."""
        self._known = object()  # equal to no stamp, not even to that of a file that is gone


class Oversight:
    """`listeners` are called in the event loop, after what they are told of is in force."""

    def __init__(self, service: Service, files: PolicyFiles, seen: Stamp, suspended: Path) -> None:
        """`seen`: the stamp of the policies in force, from before they were read.

        Raises SuspensionError for a file that is broken, or names an expert there isn't.
        """
        self.listeners: list[Callable[[Change], None]] = []
        self.policy_fault = ""
        """What is wrong with the policies that were read last, where they are not in force."""
        self._service = service
        self._files = files
        self._running = service.catalogue
        self._path = suspended
        self._policy_watch = _Watch(files.stamp, seen)
        self._suspended_watch = _Watch(lambda: stamp(suspended), stamp(suspended))
        self._suspended_fault = ""
        self._lost_by: PolicySet | None = None  # who lost what by these is not known yet
        names = suspensions.read(suspended) or frozenset()
        for name in sorted(names):
            self._index(name)
        service.suspended = self._experts(names)

    async def watch(self) -> None:
        """Looks until it is cancelled."""
        sources = self._service.identity.sources
        # Apart, because a large file takes long to read, and an issuer long to answer. What any of
        # them finds it puts in force and judges grants by in one step of the event loop, with
        # what the others have put in force by then; so whichever comes last sees all of it.
        await asyncio.gather(
            _again(self.look_at_suspensions, LOOK_EVERY_S),
            _again(self.look_at_policies, LOOK_EVERY_S),
            _again(self.look_at_losses, LOOK_EVERY_S),
            *(_again(partial(self.look_at, source), LOOK_EVERY_S) for source in sources),
            _again(self.look_at_ends, LOOK_EVERY_S),
            _again(self.look_at_tokens, _TOKENS_EVERY_S),
        )

    async def look_at_suspensions(self) -> None:
        """Puts in force what has changed since the look before, without a wait."""
        if not self._suspended_watch.changed():
            return
        fault = ""
        try:
            self._read_suspensions()
        except SuspensionError as error:
            fault = str(error).replace("\n", "; ")
            if fault != self._suspended_fault:  # once, and not at every look
                log.error("what was suspended stays so: %s", fault)
            if _unread(error):
                self._suspended_watch.again()
        except Exception:
            self._suspended_watch.again()
            raise
        self._suspended_fault = fault

    async def look_at_policies(self) -> None:
        """Puts in force what has changed since the look before, of the catalogue as well."""
        if not self._policy_watch.changed():
            return
        try:
            await self._reload()
        except Exception:  # of no file's content, so the same may go well at the next look
            self._policy_watch.again()
            raise

    async def look_at_losses(self) -> None:
        """Forgets what is cached with experts that somebody lost by other policies, here or not."""
        policies, every = self._lost_by, self._running.all
        if policies is None:
            return
        try:
            losses = self._service.namespaces.losses
            lost = await beside(partial(losses, policies.decide, every), "losses")
        except Exception:
            log.exception("who lost what can't be told, so all that is cached is forgotten")
            lost = every
        self._forget(lost)
        if self._lost_by is policies:  # else others came into force meanwhile
            self._lost_by = None

    async def look_at(self, source: CredentialSource) -> None:
        """Puts in force what its credentials are judged by, and judges those of open grants."""
        change = await self._timed("credentials", source.refresh())
        if change is None:
            return
        vouchers = change.vouchers
        # Before anybody who is told from now on who they are finds what was cached before; and
        # once more for what open grants cache until they have been judged.
        self._forget_of(vouchers)
        self._tell(change)
        for grant in self._service.grants:
            if voucher(grant.tenant) in vouchers:
                await self._judge(grant)
        self._forget_of(vouchers)

    async def look_at_ends(self) -> None:
        """Ends what lives longer than its credential."""
        now = datetime.now(UTC)
        for grant in self._service.grants:
            expires = None if grant.basis is None else grant.basis.principal.expires
            if expires is not None and expires <= now:
                self._withdraw(grant, grant.experts)

    async def look_at_tokens(self) -> None:
        """Judges those of open grants again: nobody tells that an issuer took a key back."""
        for grant in self._service.grants:
            if grant.basis is not None and grant.basis.principal.via.startswith("jwt:"):
                await self._judge(grant)
                await asyncio.sleep(0)  # signatures take time, and streams wait

    def reload(self) -> None:
        """Has the policies read at the next look, changed or not."""
        self._policy_watch.again()

    async def suspend(self, expert: str) -> bool:
        """Takes an expert from everybody, now and after a restart; False where that was so.

        Raises SuspensionError for an expert there isn't, a file that can't be written, and where
        the expert isn't taken from everybody for another reason.
        """
        index = self._index(expert)
        change = partial(suspensions.suspend, self._path, expert, self._held())
        changed = await beside(change, "suspend")
        self._read_suspensions()
        if index not in self._service.suspended:
            raise SuspensionError(f"{self._path}: another has changed it meanwhile")
        return changed

    async def resume(self, expert: str) -> bool:
        """Ends what `suspend` began; False where nothing had begun. Raises SuspensionError."""
        index = self._index(expert)
        change = partial(suspensions.resume, self._path, expert, self._held())
        changed = await beside(change, "resume")
        self._read_suspensions()
        if index in self._service.suspended:
            raise SuspensionError(f"{self._path}: another has changed it meanwhile")
        return changed

    def _held(self) -> frozenset[str]:
        """What stays suspended where the file is gone, and so has to stand in the next one."""
        return frozenset(self._running.names(self._service.suspended))

    def _index(self, expert: str) -> int:
        index = self._running.index(expert)
        if index is None:
            known = ", ".join(self._running.names(self._running.all))
            raise SuspensionError(f"{self._path}: there is no expert {expert!r}, only {known}")
        return index

    def _experts(self, names: frozenset[str]) -> ExpertSet:
        return ExpertSet.of(e.index for e in self._running.experts if e.name in names)

    def _read_suspensions(self) -> None:
        """Puts in force what the file says. Raises SuspensionError where it says nothing."""
        names = suspensions.read(self._path)
        if names is None:
            if self._service.suspended:
                raise SuspensionError(f"{self._path}: is gone")
            return
        suspended, before = self._experts(names), self._service.suspended
        for name in sorted(names - set(self._running.names(suspended))):
            log.error("%s: there is no expert %r to suspend", self._path, name)
        self._service.suspended = suspended
        self._forget(suspended - before)
        self._withdraw_lost()
        for name in self._running.names(suspended - before):
            self._tell(Suspended(name))
        for name in self._running.names(before - suspended):
            self._tell(Resumed(name))

    async def _reload(self) -> None:
        asked = [(grant, grant.basis) for grant in self._service.grants if grant.basis is not None]
        bases = [basis for _, basis in asked]
        try:
            load = partial(self._load, bases)
            catalogue, policies, decisions = await self._timed("policies", beside(load, "policies"))
        except (PolicyError, CatalogueError) as error:
            fault = str(error).replace("\n", "; ")
            if _unread(error):
                self._policy_watch.again()
                if fault == self.policy_fault:
                    return  # told when it was tried first
            self.policy_fault = fault
            self._tell(PoliciesRefused(fault, self._service.policies.version))
            return
        if not self._policy_watch.still():
            return  # changed while it was read; the next look sees that as well
        previous = self._service.policies.version
        if policies.version != previous and self._lost_by is not None:
            self._forget(catalogue.all)  # who lost what isn't known yet, and may have it back now
        self._service.catalogue, self._service.policies = catalogue, policies
        for (grant, basis), decision in zip(asked, decisions, strict=True):
            if grant.basis is basis:  # else its credential says something else now
                grant.basis = replace(basis, decision=decision)
        self._withdraw_lost()
        self.policy_fault = ""
        self._tell(PoliciesLoaded(policies.version, previous))
        if policies.version != previous:
            self._lost_by = policies
            find = partial(policies.doubts, self._service.identity.groups)
            for doubt in await beside(find, "doubts"):
                log.warning("%s", doubt)

    async def _timed(self, what: str, reading: Awaitable[T]) -> T:
        """Has the server know of it, as a disk that hangs would hold it up for good."""
        begun = what, time.monotonic()
        self._service.reading.append(begun)
        try:
            return await reading
        finally:
            self._service.reading.remove(begun)

    def _load(self, bases: Sequence[Basis]) -> tuple[Catalogue, PolicySet, list[Decision]]:
        """What the files say, and what that means for each of `bases`."""
        catalogue, policies = self._files.load(self._running)
        return catalogue, policies, [_decision(policies, basis) for basis in bases]

    async def _judge(self, grant: Grant) -> None:
        """Withdraws it where its credential doesn't hold, or isn't worth as much as it was."""
        if grant.basis is None:
            return
        try:
            principal = await self._service.identity.identify(grant.basis.connection)
        except ApiError as error:
            # Above, it can't be judged now; that doesn't say that it no longer holds.
            if error.status < 500:
                self._withdraw(grant, grant.experts)
            return
        except Exception:  # there may be others behind it
            log.exception("a request's credential could not be judged")
            self._withdraw(grant, grant.experts)
            return
        if principal.id != grant.tenant:  # the credential is somebody else's now
            self._withdraw(grant, grant.experts)
            return
        before, basis = grant.basis.principal, replace(grant.basis, principal=principal)
        if principal != before:
            basis = replace(basis, decision=_decision(self._service.policies, basis))
        if principal != before or principal.expires != before.expires:
            grant.basis = basis
        self._withdraw(grant, self._lost(grant))

    def _withdraw_lost(self) -> None:
        for grant in self._service.grants:
            lost = self._lost(grant)
            self._withdraw(grant, lost)
            self._forget(lost)

    def _lost(self, grant: Grant) -> ExpertSet:
        """What of it would not be granted now; all of it where that can't be told."""
        basis, policies = grant.basis, self._service.policies
        if basis is None:
            return ExpertSet(0)
        if basis.decision.version != policies.version:  # it was given while they were read
            basis = grant.basis = replace(basis, decision=_decision(policies, basis))
        return grant.experts - (basis.decision.granted - self._service.suspended)

    def _withdraw(self, grant: Grant, experts: ExpertSet) -> None:
        if experts and grant.open:
            grant.withdraw()
            request_id = None if grant.basis is None else grant.basis.request_id
            names = tuple(self._running.names(experts))
            self._tell(Withdrawn(request_id, grant.tenant, names))

    def _forget(self, experts: ExpertSet) -> None:
        if experts and self._service.engine is not None:
            self._service.engine.forget(experts)

    def _forget_of(self, vouchers: Collection[str]) -> None:
        if self._service.engine is not None:
            self._service.engine.forget_of(vouchers)

    def _tell(self, change: Change) -> None:
        level = logging.ERROR if isinstance(change, PoliciesRefused) else logging.WARNING
        log.log(level, "%s", _words(change))
        for listener in self.listeners:
            try:
                listener(change)
            except Exception:  # there may be more to withdraw
                log.exception("%s could not be told", change)


def _decision(policies: PolicySet, basis: Basis) -> Decision:
    """What they say of it now; where that can't be told, that nothing is granted."""
    try:
        return policies.decide(basis.principal, basis.context)
    except Exception:  # there may be others behind it
        log.exception("a request could not be judged")
        return Decision(ExpertSet(0), {}, policies.version)


def _unread(error: Exception) -> bool:
    """Whether a file could not be read, which says nothing of what is in it."""
    return isinstance(error.__cause__, OSError)


async def _again(look: Callable[[], Awaitable[None]], every_s: float) -> None:
    fault = ""
    while True:
        await asyncio.sleep(every_s)
        try:
            await look()
        except Exception as error:  # whatever it was, the next change must still be seen
            if fault != repr(error):  # once, and not forty times a second
                log.exception("what permissions rest on could not be looked at")
            fault = repr(error)


def _words(change: Change) -> str:
    match change:
        case PoliciesLoaded(version, previous):
            same = " as before" if version == previous else ""
            return f"policies {version[:12]} are in force{same}"
        case PoliciesRefused(fault, version):
            return f"policies {version[:12]} stay in force: {fault}"
        case CredentialsChanged(issuer, changed):
            whose = "API keys" if issuer is None else f"keys of {issuer}"
            ids = ", ".join(sorted({repr(change.id) for change in changed[:_SHOWN]}))
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            return f"{whose} have changed: {ids}{more}"
        case Suspended(expert):
            return f"expert {expert} is suspended"
        case Resumed(expert):
            return f"expert {expert} is no longer suspended"
        case Withdrawn(request, principal, experts):
            return f"request {request} of {principal!r} was ended: {', '.join(experts)} withdrawn"
