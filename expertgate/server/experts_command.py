"""`expertgate experts`: whose they are, an owner's switch, and digests of their weights."""

from pathlib import Path

import click

from expertgate.model.checkpoint import Checkpoint
from expertgate.server import suspensions
from expertgate.server.columns import echo_columns
from expertgate.server.config import CONFIG_FILE, Config
from expertgate.server.policy_source import PolicySource
from expertgate.server.suspensions import SuspensionError

_config = click.option(
    "--config",
    type=click.Path(path_type=Path),
    help=f"The server's configuration. Default: {CONFIG_FILE}.",
)
_catalogue = click.option(
    "--catalogue",
    type=click.Path(path_type=Path),
    help="File of the experts; overrides the configuration's. To list them, it is enough alone.",
)


@click.group()
def experts() -> None:
    """Experts: whose they are, and a switch that takes one away."""


@experts.command("list")
@_config
@_catalogue
def list_(config: Path | None, catalogue: Path | None) -> None:
    """Say which experts there are, whose, and which are suspended."""
    source = PolicySource.of(config, None, catalogue)
    rows = [("NAME", "OWNER", "STATE")]
    for expert in source.catalogue.experts:
        state = "suspended" if expert.name in source.suspended else "active"
        rows.append((expert.name, expert.owner, state))
    echo_columns(rows)


@experts.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
def digest(checkpoint: Path) -> None:
    """Print the SHA-256 of each expert's weights.

    Behind its index, as a catalogue states it. CHECKPOINT is a folder, all of which is read.
    """
    found = Checkpoint(checkpoint)
    for index, sha256 in found.expert_digests(range(found.num_experts)).items():
        click.echo(f"{index}  {sha256}")


@experts.command()
@click.argument("name")
@_config
@_catalogue
def suspend(name: str, config: Path | None, catalogue: Path | None) -> None:
    """Take NAME from everybody. A server that runs ends what uses it; one that starts obeys."""
    changed = suspensions.suspend(_file(name, config, catalogue), name)
    click.echo(f"{name} is suspended" + ("" if changed else ", and was so before"))


@experts.command()
@click.argument("name")
@_config
@_catalogue
def resume(name: str, config: Path | None, catalogue: Path | None) -> None:
    """Give NAME back to whom policies grant it."""
    changed = suspensions.resume(_file(name, config, catalogue), name)
    click.echo(f"{name} is not suspended" + ("" if changed else ", and was not before"))


def _file(name: str, config: Path | None, catalogue: Path | None) -> Path:
    """Raises SuspensionError for an expert that there isn't: a slip would suspend nobody."""
    known = PolicySource.of(config, None, catalogue).catalogue
    if known.index(name) is None:
        names = ", ".join(known.names(known.all))
        raise SuspensionError(f"there is no expert {name!r}, only {names}")
    return Config.load(config or Path(CONFIG_FILE)).suspended
