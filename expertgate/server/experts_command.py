"""`expertgate experts`: an owner's switch."""

from pathlib import Path

import click

from expertgate.server import suspensions
from expertgate.server.config import CONFIG_FILE, Config
from expertgate.server.policy_source import PolicySource
from expertgate.server.suspensions import SuspensionError

_config = click.option(
    "--config", type=click.Path(path_type=Path), default=CONFIG_FILE, show_default=True
)
_catalogue = click.option(
    "--catalogue", type=click.Path(path_type=Path), help="Where no checkpoint is at hand."
)


@click.group()
def experts() -> None:
    """Experts: take one from everybody at once, and give it back."""


@experts.command()
@click.argument("name")
@_config
@_catalogue
def suspend(name: str, config: Path, catalogue: Path | None) -> None:
    """Take NAME from everybody. A server that runs ends what uses it; one that starts obeys."""
    changed = suspensions.suspend(_file(name, config, catalogue), name)
    click.echo(f"{name} is suspended" + ("" if changed else ", and was so before"))


@experts.command()
@click.argument("name")
@_config
@_catalogue
def resume(name: str, config: Path, catalogue: Path | None) -> None:
    """Give NAME back to whom policies grant it."""
    changed = suspensions.resume(_file(name, config, catalogue), name)
    click.echo(f"{name} is not suspended" + ("" if changed else ", and was not before"))


def _file(name: str, config: Path, catalogue: Path | None) -> Path:
    """Raises SuspensionError for an expert that there isn't: a slip would suspend nobody."""
    known = PolicySource.of(config, None, catalogue).catalogue
    if known.index(name) is None:
        names = ", ".join(known.names(known.all))
        raise SuspensionError(f"there is no expert {name!r}, only {names}")
    return Config.load(config).suspended
