"""`expertgate usage`: who is owed what, out of the audit log."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from expertgate.server.audit.chain import shown
from expertgate.server.audit.usage import By, add_up
from expertgate.server.config import CONFIG_FILE, AuditConfig, Config, ConfigError

_COLUMNS = ("requests", "unknown", "tokens", "computed")
_DIGITS = 3


def _time(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no ISO 8601 date or time") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _configured(_: click.Context, __: click.Parameter, given: Path | None) -> Path:
    """That of the server whose configuration is here, if none is given."""
    if given is not None or not Path(CONFIG_FILE).exists():
        return given or AuditConfig().path
    try:
        return Config.load(Path(CONFIG_FILE)).audit.path
    except ConfigError as error:
        raise ConfigError(f"{error}\nor name the log's folder") from None


@click.command()
@click.argument("path", type=click.Path(path_type=Path), required=False, callback=_configured)
@click.option(
    "--by",
    type=click.Choice(["expert", "owner", "principal"]),
    required=True,
    help="What each row is about.",
)
@click.option(
    "--from",
    "since",
    callback=_time,
    metavar="TIME",
    help="Requests that ended at this time or later; UTC where no zone is given.",
)
@click.option(
    "--to", "until", callback=_time, metavar="TIME", help="Requests that ended before this time."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
)
def usage(path: Path, by: By, since: datetime | None, until: datetime | None, form: str) -> None:
    """Add up the usage in the audit log.

    PATH is the log's folder. Default: `audit.path` of expertgate.yaml, or audit without one.
    """
    if since is not None and until is not None and until <= since:
        raise click.BadParameter("--to must be later than --from; it is not included")
    rows = []
    for row in add_up(path, by, since, until):
        fields = asdict(row)
        counts = {name: fields[name] for name in _COLUMNS}
        counts = {
            name: round(value, _DIGITS) if isinstance(value, float) else value
            for name, value in counts.items()
        }
        rows.append({by: row.name, **counts})
    click.echo(_FORMS[form](by, rows), nl=False)


def _table(by: str, rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [(by, *_COLUMNS), *(tuple(map(shown, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])],
        )
        + "\n"
        for line in lines
    )


def _csv(by: str, rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, (by, *_COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _json(_: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


_FORMS: Mapping[str, Callable[[str, Sequence[Mapping[str, Any]]], str]] = {
    "table": _table,
    "csv": _csv,
    "json": _json,
}
