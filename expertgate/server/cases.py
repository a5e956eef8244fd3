"""Tables of who asks for what, and what they should get: a YAML file.

- case: a nurse on duty            # may be missing, as may all but the principal
  principal: alice
  groups: [clinical]
  claims: {department: care}
  purpose: care
  address: 10.0.0.7
  time: 2026-11-24T12:00:00Z       # must be there where a policy reads the clock
  granted: [public, formulary]     # exactly these
  denied: [news]                   # at least these
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyAddress,
)

from expertgate.model.catalogue import Catalogue
from expertgate.policies.cedar import PolicySet
from expertgate.policies.context import Context, ip_address
from expertgate.policies.decision import Decision
from expertgate.policies.principal import Principal
from expertgate.server.circumstances import PURPOSES, is_purpose
from expertgate.server.policy_source import PolicySource
from expertgate.server.times import in_utc
from expertgate.server.yaml_file import YamlError, YamlFile

_CLOCK = {"time", "weekday"}


class CasesError(ValueError):
    """What is wrong with a table: one fault a line, each with file, line and place."""


def _text(value: object) -> object:
    # Pydantic would take numbers for both, and 2026 for half an hour past midnight in 1970.
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


class Case(BaseModel):
    """One line of a table; see the module's words for an example."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: str = ""
    principal: Annotated[str, Field(strict=True, min_length=1)]
    groups: frozenset[str] = frozenset()
    claims: dict[str, Any] = Field(default_factory=dict)
    purpose: str | None = None
    address: Annotated[IPvAnyAddress, BeforeValidator(_text)] | None = None
    time: Annotated[AwareDatetime, BeforeValidator(_text), AfterValidator(in_utc)] | None = None
    granted: list[str] | None = None
    denied: list[str] = Field(default_factory=list)

    @property
    def name(self) -> str:
        groups = f" ({', '.join(sorted(self.groups))})" if self.groups else ""
        return self.case or f"{self.principal}{groups}"

    def decide(self, policies: PolicySet) -> Decision:
        address = None if self.address is None else ip_address(str(self.address))
        # Where it is missing, no policy reads it: `CaseTable.read` has seen to that.
        time = self.time or datetime.fromtimestamp(0, UTC)
        context = Context(time, self.purpose, address)
        # As of a token: null is how some issuers say that there is none.
        claims = {name: value for name, value in self.claims.items() if value is not None}
        return policies.decide(Principal(self.principal, self.groups, claims), context)

    def failures(self, granted: set[str]) -> set[str]:
        """The experts that are granted or denied, and should not be."""
        wrong = granted & set(self.denied)
        return wrong if self.granted is None else wrong | granted ^ set(self.granted)


class CaseTable:
    """Cases, each with the place where it stands."""

    def __init__(self, file: YamlFile, cases: list[Case]) -> None:
        # A list: several may stand in one line.
        self.cases = [(f"{file.path}:{file.lines[index,]}", c) for index, c in enumerate(cases)]

    @classmethod
    def read(cls, path: Path, source: PolicySource, *policies: PolicySet) -> "CaseTable":
        """Raises CasesError for what is malformed, or doesn't fit experts, claims or policies."""
        try:
            file = YamlFile.read(path)
            if not file.value:
                raise file.fault((), "is empty; it must be a list of cases")
            cases = file.validate(list[Case])
            reads = frozenset[str]().union(*(found.reads for found in policies))
            for index, case in enumerate(cases):
                _check(file, index, case, source, reads)
        except YamlError as error:
            raise CasesError(str(error)) from None
        return cls(file, cases)

    def check_expectations(self) -> None:
        """Raises CasesError for a case that expects nothing."""
        for place, case in self.cases:
            if case.granted is None and not case.denied:
                raise CasesError(f"{place}: says neither what is granted nor what is denied")


def _check(
    file: YamlFile, index: int, case: Case, source: PolicySource, reads: frozenset[str]
) -> None:
    known = _names(source.catalogue)
    for field, names in (("granted", case.granted or []), ("denied", case.denied)):
        for name in names:
            if name not in known:
                words = f"there is no expert {name!r}, only {', '.join(known)}"
                raise file.fault((index, field), words)
    if case.purpose is not None and not is_purpose(case.purpose):
        raise file.fault((index, "purpose"), PURPOSES)
    for name in case.claims:
        if name not in source.claims:
            declared = ", ".join(source.claims) or "none"
            words = f"is not declared under `claims:` in the configuration, only {declared}"
            raise file.fault((index, "claims", name), words)
    if case.time is None and reads & _CLOCK:
        raise file.fault((index,), "a policy reads the clock, so say a `time:`")


def _names(catalogue: Catalogue) -> list[str]:
    return catalogue.names(catalogue.all)
