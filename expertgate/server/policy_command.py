"""`expertgate policy`: what policies say, before they are put in force."""

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
from expertgate.server.cases import Case, CaseTable
from expertgate.server.policy_source import PolicySource

CONFIG_FILE = "expertgate.yaml"

_FAILED = 1
_WIDER = 3

Command = TypeVar("Command", bound=Callable[..., Any])


def _source_options(command: Command) -> Command:
    path = click.Path(path_type=Path)
    for option in (
        click.option(
            "--catalogue", type=path, help="An experts.json; overrides the configuration's."
        ),
        click.option(
            "--policies", type=path, help="Folder of *.cedar files; overrides the configuration's."
        ),
        click.option(
            "--config",
            type=path,
            callback=_config,
            help=f"The server's configuration. Default: {CONFIG_FILE}, which may be missing where "
            "--catalogue says which experts there are.",
        ),
    ):
        command = option(command)
    return command


def _config(_context: click.Context, _option: click.Parameter, given: Path | None) -> Path:
    """One that was named must be there."""
    if given is not None and not given.exists():
        raise click.BadParameter(f"{given} is not there")
    return given or Path(CONFIG_FILE)


@click.group()
def policy() -> None:
    """Policies: check, test, explain and compare them before they are put in force."""


@policy.command()
@_source_options
def check(config: Path, policies: Path | None, catalogue: Path | None) -> None:
    """Read and validate the policies, as the server would."""
    source = PolicySource.of(config, policies, catalogue)
    found = source.load()
    click.echo(f"{len(found)} policies about {len(source.catalogue)} experts hold: {found.version}")


@policy.command()
@click.argument("table", metavar="CASES", type=click.Path(path_type=Path))
@_source_options
def test(table: Path, config: Path, policies: Path | None, catalogue: Path | None) -> None:
    """Decide each case of a table; exits with 1 where one is decided otherwise than it says."""
    source = PolicySource.of(config, policies, catalogue)
    found = source.load()
    cases = CaseTable.read(table, source, found)
    cases.check_expectations()
    failed = sum(
        [_failed(place, case, found, source.catalogue.names) for place, case in cases.cases]
    )
    click.echo(f"{len(cases.cases) - failed} of {len(cases.cases)} cases hold")
    sys.exit(_FAILED if failed else 0)


@policy.command()
@click.option("--as", "principal", required=True, metavar="PRINCIPAL", help="Who asks.")
@click.option("--group", "groups", multiple=True, help="A group of theirs; may be repeated.")
@click.option("--experts", help="Only these, by commas; all where missing.")
@click.option("--purpose", help="What for.")
@click.option("--address", help="From where: an IP address.")
@click.option("--time", help="When: an ISO 8601 time with its zone. Default: now.")
@_source_options
def explain(
    principal: str,
    groups: tuple[str, ...],
    experts: str | None,
    purpose: str | None,
    address: str | None,
    time: str | None,
    config: Path,
    policies: Path | None,
    catalogue: Path | None,
) -> None:
    """Say for each expert whether PRINCIPAL may consult it, and by which policies."""
    source = PolicySource.of(config, policies, catalogue)
    known = source.catalogue.names(source.catalogue.all)
    wanted = known if experts is None else [name.strip() for name in experts.split(",")]
    for name in wanted:
        if name not in known:
            raise click.BadParameter(f"there is no expert {name!r}, only {', '.join(known)}")
    context = Context(_time(time), purpose, _address(address))
    decision = source.load().decide(Principal(principal, frozenset(groups)), context)
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
@_source_options
def diff(
    old: Path, new: Path, table: Path, config: Path, policies: Path | None, catalogue: Path | None
) -> None:
    """List who gains or loses which expert by the policies of folder NEW in place of OLD's.

    Exits with 3 where anybody gains one.
    """
    source = PolicySource.of(config, policies, catalogue)
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


def _time(text: str | None) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no ISO 8601 time") from None
    if found.tzinfo is None:
        raise click.BadParameter(f"{text!r} has no time zone; add Z if UTC is meant")
    return found


def _address(text: str | None) -> Any:
    found = ip_address(text)
    if text is not None and found is None:
        raise click.BadParameter(f"{text!r} is no IP address")
    return found
