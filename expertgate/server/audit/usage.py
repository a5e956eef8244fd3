"""Adds up what the audit log says of requests that have ended, for whoever is paid by it.

| by | one row for each | of whom |
| --- | --- | --- |
| `expert` | expert | who did the work |
| `owner` | owner of experts, as the catalogue named them then | whose data did the work |
| `principal` | principal | for whom it was done |

A row has `requests`; `tokens`, what the router sent there, as `docs/audit.md` counts it;
`computed`, the part of the computed tokens that is theirs by routing weight; by principal, all of
them are. `unknown` are requests whose usage is not on record.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from expertgate.server.audit.chain import AuditError, RecordError, parse
from expertgate.server.audit.folder import files, lines

By = Literal["expert", "owner", "principal"]


@dataclass(slots=True)
class Row:
    name: str
    requests: int = 0
    unknown: int = 0
    tokens: float = 0.0
    computed: float = 0.0


def add_up(folder: Path, by: By, since: datetime | None, until: datetime | None) -> list[Row]:
    """Of results whose time is in [since, until), by name. Raises AuditError.

    The chain is not checked: that is what `verify` is for.
    """
    rows: dict[str, Row] = {}
    catalogues: dict[str, Mapping[str, str]] = {}  # by digest, the owner of each expert
    # Whose experts they were when the request was permitted, as its receipt says.
    permitted: dict[str, tuple[str, Mapping[str, str]]] = {}
    for place, record in _records(folder):
        try:
            match record["kind"]:
                case "start" | "catalogue":
                    owners = {one["name"]: one["owner"] for one in record["experts"]}
                    catalogues[record["catalogue"]] = owners
                case "request":
                    known = catalogues.get(record["catalogue"], {})
                    permitted[record["request"]] = record["principal"], known
                case "result":
                    principal, whose = permitted.pop(record["request"], ("", {}))
                    time = datetime.fromisoformat(record["time"])
                    if (since is None or since <= time) and (until is None or time < until):
                        _add(rows, record, by, whose, principal)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise AuditError(f"{place}: a {record['kind']} record without what it needs") from None
    return sorted(rows.values(), key=lambda row: row.name)


def _add(
    rows: dict[str, Row],
    record: Mapping[str, Any],
    by: By,
    owners: Mapping[str, str],
    principal: str,
) -> None:
    usage = record["usage"]
    parts: dict[str, tuple[float, float]] = {}
    for name in record["effective"]:
        found = {"tokens": 0, "share": 0} if usage is None else usage["experts"][name]
        computed = 0 if usage is None else usage["computed_tokens"]
        whose = {"expert": name, "owner": owners.get(name, ""), "principal": principal}[by]
        if not isinstance(whose, str):
            raise TypeError
        tokens, work = parts.get(whose, (0.0, 0.0))
        parts[whose] = tokens + found["tokens"], work + found["share"] * computed
    for whose, (tokens, work) in parts.items():
        row = rows.setdefault(whose, Row(whose))
        row.requests += 1
        row.unknown += usage is None
        row.tokens += tokens
        row.computed += work


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    paths = files(folder)
    if not paths:
        raise AuditError(f"{folder}: has no log: its files are called {1:016}.jsonl and so on")
    for path in paths:
        for number, line in lines(path):
            try:
                yield f"{path}:{number}", parse(line)
            except RecordError as error:
                raise AuditError(f"{path}:{number}: {error}") from None
