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

BY_A_START = frozenset({"start", "recovered", "gap"})
"""Kinds that a server which starts writes before it signs, which it does at once."""

NOT_CANONICAL = "has a value that no canonical form can hold"

Record = Mapping[str, Any]


class AuditError(ValueError):
    """A log, key or receipt that can't be used; one line that says where and why."""


class RecordError(ValueError):
    """A line that is no record; its words are for whoever knows file and line."""


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode
_MAX_INT = (1 << 53) - 1


def line_of(record: Record) -> bytes:
    """Without the end of line. Raises ValueError for what JSON has no single way to write."""
    # The library writes byte by byte, in Python: a tenth of a millisecond and more for a record,
    # on a lock that streams wait for. Of nearly every record Python's own encoder writes the same.
    return _encode(record).encode() if _is_plain(record) else rfc8785.dumps(dict(record))


def _is_plain(value: object) -> bool:
    """Whether the canonical form is also what `json` writes with sorted keys and no spaces."""
    if value is None or isinstance(value, str | bool):
        return True
    if isinstance(value, int):
        return -_MAX_INT <= value <= _MAX_INT
    if isinstance(value, float):
        # Python writes 1.0 and 1e-05 where the canonical form has 1 and 0.00001.
        return 1e-4 <= value < 1e15 and not value.is_integer()
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        # Of other keys the order may be another: it is that of UTF-16.
        return all(isinstance(key, str) and key.isascii() for key in value) and all(
            map(_is_plain, value.values())
        )
    return False


def shown(said: object) -> str:
    """What a record or receipt says that anybody may have written, kept to its line."""
    text = str(said)
    return text if text.isprintable() else ascii(text)


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
    except (ValueError, RecursionError):
        raise RecordError(NOT_CANONICAL) from None
    if canonical != line:
        raise RecordError("is not in canonical form (RFC 8785): it was written by something else")
