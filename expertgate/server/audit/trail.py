"""What the server says to its audit log; `docs/audit.md` explains each kind of record.

| kind | when |
| --- | --- |
| `start`, `stop` | the server, with its version, catalogue, policies and signing key |
| `probe` | the server tried its engine before it was ready, on a text of its own |
| `request` | a request was permitted; on disk before the engine sees it |
| `result` | it has ended: how, and what each expert did for it |
| `policies`, `policies_refused`, `catalogue` | other ones are in force, or could not be |
| `credentials` | a key was made, rotated, changed or revoked, or an issuer has another |
| `suspended`, `resumed`, `withdrawn` | an expert, for everybody; a running request for it |
| `refused`, `refusals` | requests that were not permitted or not understood; how many more |
| `head` | a signature over all before (`writer.py`) |
| `recovered`, `gap` | a crash tore the end; the disk failed for a while (`writer.py`) |
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import expertgate
from expertgate.model.catalogue import Catalogue
from expertgate.policies.principal import Principal
from expertgate.server.audit.chain import AuditError, digest, line_of
from expertgate.server.audit.entry import Entry, append
from expertgate.server.audit.lately import lately
from expertgate.server.audit.receipts import Receipts
from expertgate.server.audit.writer import AuditLog, AuditUnavailable, Recorded
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
from expertgate.server.grants import Grant

_REFUSALS_EACH = 10
"""Refusals of one principal that get a record of their own within `_REFUSALS_S`."""
_REFUSALS_S = 60.0


class Trail:
    """Without a log every request is waived, and nothing else is said."""

    def __init__(
        self, audit_log: AuditLog | None, catalogue: Catalogue, *, hashed: bool = False
    ) -> None:
        """`hashed`: receipts name principals by a salted hash."""
        self.log = audit_log
        self.receipts = (
            None if audit_log is None else Receipts(audit_log.key, audit_log.hurry, hashed=hashed)
        )
        self._catalogue = catalogue
        self.catalogue_digest = _digest(catalogue)
        self._described = _described(catalogue)
        self._refused: Counter[tuple[str, str] | None] = Counter()
        self._uncounted: Counter[tuple[int, str]] = Counter()
        self._refused_since = time.monotonic()
        self._started = False

    @property
    def ready(self) -> bool:
        """Whether requests can be recorded, or need not be."""
        return self.log is None or self.log.healthy or self.log.fail_open

    def start(self, model: str, policy_version: str) -> None:
        """Raises AuditError where a log that must be written can't be."""
        if self.log is None or self.receipts is None:
            return
        # First: the head that follows the start will vouch for whatever stands at the end now.
        experts = self._experts()
        self.receipts.restore(
            lately(self.log.folder, self.log.key.public),
            {experts["catalogue"]: experts["experts"]},
        )
        try:
            self.log.record(
                "start",
                version=expertgate.__version__,
                model=model,
                policy_version=policy_version,
                **experts,
            )
        except AuditUnavailable as error:
            if not self.log.fail_open:
                raise AuditError(f"{self.log.folder}: can't be written: {error}") from None
        self._started = True

    def stop(self) -> None:
        """Says so, and closes the log, signed up to its end."""
        if self.log is None:
            return
        self._tell_refusals()
        if self._started:
            self.log.note("stop")
        self.log.close()

    async def probe(self) -> Recorded:
        """Raises ApiError 503 `audit_unavailable`."""
        everything = self._catalogue.names(self._catalogue.all)
        return await append(self.log, "probe", effective=everything)

    def entry(self, request_id: str, route: str, grant: Grant, catalogue: Catalogue) -> Entry:
        """The entry of a request whose grant is not used yet."""
        assert grant.basis is not None
        self._know(catalogue)
        principal, context, decision = (
            grant.basis.principal,
            grant.basis.context,
            grant.basis.decision,
        )
        names = catalogue.names(grant.experts)
        fields = {
            "request": request_id,
            "route": route,
            **_who(principal),
            "purpose": context.purpose,
            "address": None if context.address is None else str(context.address),
            "granted": catalogue.names(decision.granted),
            "effective": names,
            "policies": {name: list(decision.reasons.get(name, ())) for name in names},
            "policy_version": decision.version,
            "catalogue": self.catalogue_digest,
        }
        experts = [self._described[index] for index in grant.experts]
        return Entry(self.log, self.receipts, grant, experts, fields)

    def changed(self, change: Change) -> None:
        """What permissions rest on is another now."""
        if self.log is None:
            return
        fields = {name: _plain(value) for name, value in asdict(change).items()}
        kind = _KINDS[type(change)]
        if not isinstance(change, CredentialsChanged):
            self.log.note(kind, **fields)
            return
        for each in fields["changed"]:  # one by one: a line has an end, a key file has none
            self.log.note(kind, issuer=fields["issuer"], **each)

    def _know(self, catalogue: Catalogue) -> None:
        """Another catalogue is told before what it names; its experts are still the same."""
        if catalogue is self._catalogue:
            return
        self._catalogue = catalogue
        self.catalogue_digest = _digest(catalogue)
        self._described = _described(catalogue)
        if self.log is not None:
            self.log.note("catalogue", **self._experts())

    def _experts(self) -> dict[str, Any]:
        return {"catalogue": self.catalogue_digest, "experts": self._described}

    def refused(
        self, route: str, principal: Principal | None, address: str | None, error: ApiError
    ) -> None:
        """Of one principal only the first few within a minute are told one by one.

        Nor can whoever has no credential fill a disk, or hide in the crowd that they make.
        """
        if self.log is None:
            return
        if time.monotonic() - self._refused_since >= _REFUSALS_S:
            self._tell_refusals()
        # An operator's name may be a user's as well.
        who = None if principal is None else (principal.via, principal.id)
        self._refused[who] += 1
        if self._refused[who] > _REFUSALS_EACH:
            self._uncounted[error.status, error.code] += 1
            return
        found: dict[str, Any] = {"principal": None} if principal is None else _who(principal)
        self.log.note(
            "refused", route=route, **found, address=address, status=error.status, code=error.code
        )

    def _tell_refusals(self) -> None:
        assert self.log is not None
        if self._uncounted:
            counts = [
                {"status": status, "code": code, "count": count}
                for (status, code), count in sorted(self._uncounted.items())
            ]
            self.log.note("refusals", more=counts)
        self._refused.clear()
        self._uncounted.clear()
        self._refused_since = time.monotonic()


_KINDS: Mapping[type[Change], str] = {
    PoliciesLoaded: "policies",
    PoliciesRefused: "policies_refused",
    CredentialsChanged: "credentials",
    Suspended: "suspended",
    Resumed: "resumed",
    Withdrawn: "withdrawn",
}


def _digest(catalogue: Catalogue) -> str:
    """SHA-256 of the catalogue's canonical form, weight hashes and all."""
    return digest(line_of(catalogue.model_dump(mode="json")))


def _described(catalogue: Catalogue) -> list[dict[str, Any]]:
    """What records and receipts say of each expert."""
    return [
        {"name": one.name, "owner": one.owner, "sha256": one.sha256} for one in catalogue.experts
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    # Half of a surrogate pair is text to Python, and to no canonical form.
    return text.encode("utf-8", "replace").decode()


def _who(principal: Principal) -> dict[str, Any]:
    return {
        "principal": _text(principal.id),
        "via": principal.via,
        "groups": sorted(map(_text, principal.groups)),
    }
