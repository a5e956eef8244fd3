"""One record as one line, and the chain that the lines make.

A line is the record's canonical form (RFC 8785), so there is one way to write a record and its
hash is that of the line. Each record names its number and the hash of the line before it:

    {"kind":"start","prev":"0000…","seq":1,"time":"2026-11-24T22:47:15.123456Z","v":1,…}
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import rfc8785

VERSION = 1
GENESIS = "0" * 64
"""What the first record names as the hash of the line before it."""

Record = Mapping[str, Any]


class AuditError(ValueError):
    """A log, key or receipt that can't be used; one line that says where and why."""


class RecordError(ValueError):
    """A line that is no record; its words are for whoever knows file and line."""


def line_of(record: Record) -> bytes:
    """Without the end of line. Raises ValueError for what JSON has no single way to write."""
    return rfc8785.dumps(dict(record))


def digest(line: bytes) -> str:
    """SHA-256 in hex of a line without its end."""
    return hashlib.sha256(line).hexdigest()


def parse(line: bytes) -> dict[str, Any]:
    """The record of a line, of which only what the chain needs has been looked at.

    Raises RecordError.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise RecordError("is not JSON") from None
    if not isinstance(record, dict):
        raise RecordError("is not a JSON object")
    for name, kind in (("v", int), ("seq", int), ("prev", str), ("kind", str), ("time", str)):
        if type(record.get(name)) is not kind:
            raise RecordError(f"has no {name!r}, or one of the wrong type")
    if record["v"] != VERSION:
        raise RecordError(f"is of version {record['v']}; this program reads {VERSION}")
    return record


def check_canonical(record: Record, line: bytes) -> None:
    """Raises RecordError where the line says the record in another way than the canonical one."""
    try:
        canonical = line_of(record)
    except ValueError:
        raise RecordError("has a value that no canonical form can hold") from None
    if canonical != line:
        raise RecordError("is not in canonical form (RFC 8785): it was written by something else")
