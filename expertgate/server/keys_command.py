"""`expertgate keys`: making, listing, replacing and ending API keys."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from expertgate.server.columns import echo_columns
from expertgate.server.config import CONFIG_FILE, Config, ConfigError
from expertgate.server.key_edits import create_key, expire_key, revoke_key, rotate_key
from expertgate.server.keys import Key, KeysError, parse_keys
from expertgate.server.times import in_utc

_SPAN = re.compile(r"([0-9]{1,4})([dhm])")
_DEFAULT = Path("keys.yaml")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def _span(text: str) -> timedelta | None:
    match = _SPAN.fullmatch(text)
    return timedelta(**{_UNITS[match[2]]: int(match[1])}) if match else None


def _grace(_: click.Context, __: click.Parameter, value: str) -> timedelta:
    span = _span(value)
    if span is None:
        raise click.BadParameter(f"{value!r} is no time span, such as 7d, 24h or 30m")
    return span


def _expiry(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    now = datetime.now(UTC).replace(microsecond=0)
    span = _span(value)
    if span is not None:
        time = now + span
    else:
        try:
            time = datetime.fromisoformat(value)
        except ValueError:
            raise click.BadParameter(
                f"{value!r} is neither a time span, such as 30d, 24h or 90m, nor an ISO 8601 time, "
                "such as 2027-01-01T00:00:00Z"
            ) from None
    try:
        time = in_utc(time)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} {error}") from None
    if time <= now:
        raise click.BadParameter(f"{value!r} is not in the future")
    return time


def _groups(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    for group in given:
        if "," in group:  # a group of that name would be in no policy, and no header could name it
            raise click.BadParameter(f"{group!r} has a comma; repeat --group for each")
    return given


def _configured(_: click.Context, option: click.Parameter, given: Path | None) -> Path:
    """That of the server whose configuration is here: another would change nothing for it."""
    if given is not None or not Path(CONFIG_FILE).exists():
        return given or _DEFAULT
    try:
        found = Config.load(Path(CONFIG_FILE)).identity.api_keys
    except ConfigError as error:
        raise ConfigError(f"{error}\nor name the key file with --file") from None
    if found is None:
        words = f"{CONFIG_FILE} has no identity.api_keys; name a file"
        raise click.BadParameter(words, param=option)
    return found


def _file(help: str) -> Callable[[Any], Any]:  # noqa: A002
    return click.option(
        "--file",
        "path",
        type=click.Path(dir_okay=False, path_type=Path),
        callback=_configured,
        help=f"{help} Default: `identity.api_keys` of {CONFIG_FILE}, or {_DEFAULT} without one.",
    )


@click.group()
def keys() -> None:
    """API keys: a file of their hashes, and whose they are.

    A running server sees every change at once.
    """


@keys.command()
@click.option("--id", required=True, help="Whom the key is for; policies know it as User.")
@click.option(
    "--group",
    "groups",
    multiple=True,
    callback=_groups,
    help="A group of theirs; may be repeated.",
)
@click.option("--expires", callback=_expiry, metavar="30d|TIME", help="When it ends, if ever.")
@click.option(
    "--may-assert",
    is_flag=True,
    help="For a gateway: it names its users, with no other groups than these.",
)
@_file("The key file, which is made if it is missing.")
def create(
    id: str,  # noqa: A002
    groups: tuple[str, ...],
    expires: datetime | None,
    may_assert: bool,
    path: Path,
) -> None:
    """Make a key and print it, this once."""
    secret = create_key(path, id, groups, expires, may_assert=may_assert)
    _show(secret, id, path)


@keys.command("list")
@_file("The key file.")
def list_(path: Path) -> None:
    """Say which keys there are, without any secret."""
    try:
        known = parse_keys(path.read_bytes(), path)
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror or error}") from None
    now = datetime.now(UTC)
    head = ("ID", "STATE", "CREATED", "EXPIRES", "GROUPS")
    echo_columns([head, *(_row(key, now) for key in known)])


@keys.command()
@click.argument("id")
@click.option(
    "--grace",
    callback=_grace,
    default="24h",
    show_default=True,
    metavar="24h",
    help="How long the old secret goes on; 0h ends all old ones now.",
)
@click.option(
    "--expires", callback=_expiry, metavar="30d|TIME", help="When the key ends; else as before."
)
@_file("The key file.")
def rotate(id: str, grace: timedelta, expires: datetime | None, path: Path) -> None:  # noqa: A002
    """Give a key a new secret and print it, this once.

    Its id and groups stay.
    """
    secret = rotate_key(path, id, grace, expires)
    _show(secret, id, path)


@keys.command()
@click.argument("id")
@click.argument("when", metavar="30d|TIME", callback=_expiry)
@_file("The key file.")
def expire(id: str, when: datetime, path: Path) -> None:  # noqa: A002
    """Say when a key ends."""
    expire_key(path, id, when)


@keys.command()
@click.argument("id")
@_file("The key file.")
def revoke(id: str, path: Path) -> None:  # noqa: A002
    """End a key now, with all its secrets. Its id stays taken."""
    revoke_key(path, id)


def _show(secret: str, id: str, path: Path) -> None:  # noqa: A002
    try:
        click.echo(secret)
    except OSError as error:
        raise KeysError(
            f"the key can't be printed: {error.strerror or error}. {path} has its hash and nobody "
            f"has the key, so make another: `expertgate keys rotate {id} --grace 0h`"
        ) from None
    click.echo(f"{path} has its hash; the key itself is shown only here", err=True)


def _row(key: Key, now: datetime) -> tuple[str, str, str, str, str]:
    state = key.state(now)
    _, *replaced = key.secrets()
    old = [ends for _, _, ends in replaced if ends is not None and ends > now]
    if state == "active" and old:
        state = f"active, and its old secret until {_shown(max(old))}"
    groups = ", ".join(sorted(key.groups)) or "-"
    if key.may_assert:
        groups = f"of its users: {groups}"
    return key.id, state, _shown(key.created), _shown(key.expires), groups


def _shown(time: datetime | None) -> str:
    return "-" if time is None else time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
