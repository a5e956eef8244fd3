"""What is told of permissions that change, to whoever listens: the log, the audit, metrics."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoliciesLoaded:
    """Another set of policies is in force: its digest, and that of the one before."""

    version: str
    previous: str


@dataclass(frozen=True, slots=True)
class PoliciesRefused:
    """What was found in the files can't be put in force, and the set before stays."""

    fault: str
    version: str
    """Of the set that stays."""


@dataclass(frozen=True, slots=True)
class CredentialChange:
    """One API key, or one key of an issuer, and what is known of it; None where there is none."""

    id: str
    before: Mapping[str, object] | None
    after: Mapping[str, object] | None
    secret: bool
    """Whether it is verified by something else now: a new secret, or another public key."""


@dataclass(frozen=True, slots=True)
class CredentialsChanged:
    """API keys were made, changed or revoked, or an issuer has others."""

    issuer: str | None
    """Its name; None for API keys."""
    changed: tuple[CredentialChange, ...]

    @property
    def vouchers(self) -> frozenset[str]:
        """Those whose word was good before, and may not be now."""
        known = [change.id for change in self.changed if change.before is not None]
        return frozenset([self.issuer] if known and self.issuer is not None else known)


@dataclass(frozen=True, slots=True)
class Suspended:
    """An expert was taken from everybody."""

    expert: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """An expert that was suspended is granted again, to whom policy grants it."""

    expert: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A running request was ended, because these experts were taken from its principal."""

    request: str | None
    """Its id in the audit log."""
    principal: str
    experts: tuple[str, ...]


Change = PoliciesLoaded | PoliciesRefused | CredentialsChanged | Suspended | Resumed | Withdrawn
