"""The fields of a record, as docs/audit.md has them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).parents[3] / "docs" / "audit.md").read_text()
_COMMON = {"v", "kind", "time", "seq", "prev"}
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def _table() -> dict[str, tuple[set[str], set[str]]]:
    """By kind: the fields that are always there, and those that may be."""
    head = "| kind | says | fields |\n| --- | --- | --- |\n"
    rows = PAGE.partition(head)[2].partition("\n\n")[0]
    found = {}
    for row in rows.splitlines():
        _, kinds, _, fields, _ = row.split("|")
        always, _, sometimes = fields.partition(";")
        for kind in _named(kinds):
            found[kind] = set(_named(always)), set(_named(sometimes))
    return found


def _named(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


FIELDS = _table()


def check_fields(record: Mapping[str, Any]) -> None:
    always, sometimes = FIELDS[record["kind"]]
    assert always <= record.keys() - _COMMON <= always | sometimes, record
    assert record.keys() >= _COMMON
    assert _TIME.fullmatch(record["time"])


def examples() -> list[dict[str, Any]]:
    return [json.loads(text) for text in re.findall(r"^(\{.*\"prev\".*\})$", PAGE, re.MULTILINE)]
