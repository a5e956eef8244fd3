"""`expertgate keys`: making API keys."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from expertgate.server.keys import create_key

_DAYS = re.compile(r"([1-9][0-9]{0,3})d")


def _expiry(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    now = datetime.now(UTC).replace(microsecond=0)
    days = _DAYS.fullmatch(value)
    if days:
        return now + timedelta(days=int(days[1]))
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither days, as 30d, nor an ISO 8601 time"
        ) from None
    if time.tzinfo is None:
        raise click.BadParameter(f"{value!r} has no time zone; add Z if UTC is meant")
    if time <= now:
        raise click.BadParameter(f"{value!r} is past")
    return time


@click.group()
def keys() -> None:
    """API keys: a file of their hashes, and whose they are."""


@keys.command()
@click.option("--id", required=True, help="Whom the key is for; policies know it as User.")
@click.option("--group", "groups", multiple=True, help="A group of theirs; may be repeated.")
@click.option("--expires", callback=_expiry, metavar="30d|TIME", help="When it ends, if ever.")
@click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default="keys.yaml",
    show_default=True,
    help="The key file; made if it is missing.",
)
def create(id: str, groups: tuple[str, ...], expires: datetime | None, path: Path) -> None:  # noqa: A002
    """Make a key and print it, this once."""
    secret = create_key(path, id, groups, expires)
    click.echo(secret)
    click.echo(f"{path} has its hash; the key itself is shown only here", err=True)
