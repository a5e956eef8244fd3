"""`expertgate policy`: what policies say, before they are put in force."""

import functools
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from expertgate.policies.cedar import PolicySet
from expertgate.policies.context import Context, ip_address
from expertgate.policies.decision import Decision
from expertgate.policies.principal import Principal
from expertgate.server import claim_options
from expertgate.server.cases import Case, CaseTable
from expertgate.server.circumstances import PURPOSES, is_purpose
from expertgate.server.config import CONFIG_FILE
from expertgate.server.policy_source import PolicySource
from expertgate.server.times import in_utc

_FAILED = 1
_WIDER = 3

Command = TypeVar("Command", bound=Callable[..., Any])


def _with_source(command: Command) -> Command:
    """Gives a command the options that say where policies and experts come from, as `source`."""

    @functools.wraps(command)
    def sourced(
        config: Path | None,
        policies: Path | None,
        catalogue: Path | None,
        declared: tuple[str, ...],
        **own: Any,
    ) -> None:
        claims = claim_options.declared(declared)
        command(source=PolicySource.of(config, policies, catalogue, claims), **own)

    found: Any = sourced
    path = click.Path(path_type=Path)
    for option in (
        click.option(
            "--claims",
            "declared",
            multiple=True,
            metavar="NAME:TYPE",
            help="A claim that policies may read, besides the configuration's; may be repeated.",
        ),
        click.option(
            "--catalogue", type=path, help="File of the experts; overrides the configuration's."
        ),
        click.option(
            "--policies", type=path, help="Folder of *.cedar files; overrides the configuration's."
        ),
        click.option(
            "--config",
            type=path,
            help=f"The server's configuration. Default: {CONFIG_FILE}, which may be missing where "
            "the other options say all that is needed.",
        ),
    ):
        found = option(found)
    return found


@click.group()
def policy() -> None:
    """Policies: check, test, explain and compare them.

    Before they are put in force, that is; a server that runs isn't asked.
    """


@policy.command()
@_with_source
def check(source: PolicySource) -> None:
    """Read and validate the policies, as the server would."""
    found = source.load()
    counted = f"policies: {len(found)}; experts: {len(source.catalogue)}; version {found.version}"
    click.echo(f"no fault found; {counted}")
    for doubt in found.doubts():
        click.echo(f"note: {doubt}")


@policy.command()
@click.argument("table", metavar="CASES", type=click.Path(path_type=Path))
@_with_source
def test(source: PolicySource, table: Path) -> None:
    """Decide each case of a table.

    Exits with 1 where one is decided otherwise than it says. By policies alone, as if no expert
    were suspended.
    """
    found = source.load()
    cases = CaseTable.read(table, source, found)
    cases.check_expectations()
    failed = sum(
        [_failed(place, case, found, source.catalogue.names) for place, case in cases.cases]
    )
    click.echo(f"{len(cases.cases) - failed} of {len(cases.cases)} cases hold")
    sys.exit(_FAILED if failed else 0)


def _time(_: click.Context, __: click.Parameter, text: str | None) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        words = "is no ISO 8601 time, such as 2027-01-01T00:00:00Z"
        raise click.BadParameter(f"{text!r} {words}") from None
    try:
        return in_utc(found)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} {error}") from None


def _address(_: click.Context, __: click.Parameter, text: str | None) -> Any:
    found = ip_address(text)
    if text is not None and found is None:
        raise click.BadParameter(f"{text!r} is no IP address")
    return found


@policy.command()
@click.option(
    "--as", "principal", required=True, metavar="PRINCIPAL", help="Who asks: alice, or corp:ada."
)
@click.option(
    "--group",
    "groups",
    multiple=True,
    help="A group of theirs; may be repeated. Key files aren't read: without this, none.",
)
@click.option("--experts", help="Only these, by commas; all where missing.")
@click.option(
    "--claim",
    "claims",
    multiple=True,
    metavar="NAME=VALUE",
    help="A claim of their token; lists are separated by commas; may be repeated.",
)
@click.option("--purpose", help="What for.")
@click.option("--address", callback=_address, help="From where: an IP address.")
@click.option("--time", callback=_time, help="When: an ISO 8601 time with its zone. Default: now.")
@_with_source
def explain(
    source: PolicySource,
    principal: str,
    groups: tuple[str, ...],
    experts: str | None,
    claims: tuple[str, ...],
    purpose: str | None,
    address: Any,
    time: datetime,
) -> None:
    """Say what PRINCIPAL may consult, and by which policies.

    An expert that is suspended by the configuration's list is denied, and shown as such.
    """
    known = source.catalogue.names(source.catalogue.all)
    wanted = known if experts is None else [name.strip() for name in experts.split(",")]
    for name in wanted:
        if name not in known:
            words = f"there is no expert {name!r}, only {', '.join(known)}"
            raise click.BadParameter(words, param_hint="'--experts'")
    if not principal:
        raise click.BadParameter("--as is empty; it must name who asks")
    if purpose is not None and not is_purpose(purpose):
        raise click.BadParameter(f"--purpose {PURPOSES}")
    context = Context(time, purpose, address)
    asking = Principal(principal, frozenset(groups), claim_options.given(claims, source.claims))
    decision = source.load().decide(asking, context)
    granted = set(source.catalogue.names(decision.granted)) - source.suspended
    width = max(map(len, wanted))
    for name in wanted:
        word = "allowed" if name in granted else "denied "
        by = "suspended" if name in source.suspended else _by(decision, name)
        click.echo(f"{name:{width}}  {word}  {by}")


@policy.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--principals",
    "table",
    required=True,
    metavar="TABLE",
    type=click.Path(path_type=Path),
    help="Who to ask it of: a table of cases, whose expectations don't matter here.",
)
@_with_source
def diff(source: PolicySource, old: Path, new: Path, table: Path) -> None:
    """List who gains or loses which expert by other policies.

    By those of the folder NEW in place of OLD's. Exits with 3 where anybody gains one. By policies
    alone, as if no expert were suspended.
    """
    before, after = source.load(old), source.load(new)
    wider = 0
    for _, case in CaseTable.read(table, source, before, after).cases:
        was, now = case.decide(before), case.decide(after)
        for name in source.catalogue.names(now.granted - was.granted):
            wider += 1
            click.echo(f"+ {case.name}: gains {name}, by {_by(now, name)}")
        for name in source.catalogue.names(was.granted - now.granted):
            click.echo(f"- {case.name}: loses {name}; {_by(now, name)}")
    sys.exit(_WIDER if wider else 0)


def _failed(
    place: str, case: Case, policies: PolicySet, names: Callable[[Any], Iterable[str]]
) -> bool:
    decision = case.decide(policies)
    granted = set(names(decision.granted))
    wrong = case.failures(granted)
    if wrong:
        click.echo(f"{place}: {case.name}")
        if case.granted is not None:
            click.echo(f"  expected: {', '.join(sorted(case.granted)) or 'nothing'}")
        if case.denied:
            click.echo(f"  denied:   {', '.join(sorted(case.denied))}")
        click.echo(f"  got:      {', '.join(sorted(granted)) or 'nothing'}")
        for name in sorted(wrong):
            word = "allowed" if name in granted else "denied"
            click.echo(f"  {name} is {word}: {_by(decision, name)}")
    return bool(wrong)


def _by(decision: Decision, name: str) -> str:
    return ", ".join(decision.reasons[name])
