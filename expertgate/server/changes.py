"""What is told of permissions that change, to whoever listens: the log, the audit, metrics."""

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
class CredentialsChanged:
    """Keys were made, rotated or revoked, or an issuer has others: what held may hold no more."""


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

    principal: str
    experts: tuple[str, ...]


Change = PoliciesLoaded | PoliciesRefused | CredentialsChanged | Suspended | Resumed | Withdrawn
