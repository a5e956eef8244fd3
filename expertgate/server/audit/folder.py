"""The files of a log: `0000000000000001.jsonl` and so on, each named by its first record.

`head.json` is a copy of the newest signed head, written after the record itself is on disk: a log
that ends before it was cut. Kept elsewhere as well, it holds against whoever can write here.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expertgate.server.audit.chain import (
    BY_A_START,
    GENESIS,
    NOT_CANONICAL,
    AuditError,
    RecordError,
    digest,
    line_of,
    parse,
)
from expertgate.server.audit.signing import PublicKeys, sync_folder

HEAD_FILE = "head.json"
_NAME = re.compile(r"([0-9]{16})\.jsonl")
_ON_ITS_WAY_S = 0.5
_LOOK_INTO_IT = (
    "Move this folder away, for whoever looks into it: the next start begins a new log in its place"
)


@dataclass(frozen=True, slots=True)
class End:
    """Where a log ends: its last record's number and hash, and the last file up to there.

    `unsigned`: records after the last signed head, in the last file. `torn`: what stands in that
    file behind the last record, and is none.
    """

    seq: int
    hash: str
    unsigned: int
    path: Path | None
    size: int
    torn: bytes


def name_of(first: int) -> str:
    return f"{first:016}.jsonl"


def first_of(path: Path) -> int | None:
    """The number of the record that a file of a log begins with; None for another file."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def files(folder: Path) -> list[Path]:
    """The log's files in their order. Raises AuditError."""
    try:
        return sorted(path for path in folder.iterdir() if first_of(path) is not None)
    except OSError as error:
        raise AuditError(f"{folder}: {error.strerror or error}") from None


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of a log, with their numbers. Raises AuditError.

    A last one that isn't whole is waited for: a server that writes many records at once shows
    their beginning first.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                until = time.monotonic() + _ON_ITS_WAY_S
                while not line.endswith(b"\n") and time.monotonic() < until:
                    time.sleep(_ON_ITS_WAY_S / 25)
                    line += file.readline()
                yield number, line
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror or error}") from None


def read_head(path: Path) -> dict[str, Any]:
    """A head that was kept. Raises AuditError."""
    try:
        head = parse(path.read_bytes())
        line_of(head)
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror or error}") from None
    except RecordError as error:
        raise AuditError(f"{path}: {error}") from None
    except (ValueError, RecursionError):
        raise AuditError(f"{path}: {NOT_CANONICAL}") from None
    if head["kind"] != "head":
        raise AuditError(f"{path}: is a {head['kind']!r} record, not a head")
    return head


def replace_head(folder: Path, line: bytes) -> None:
    """`line`: with its end. Raises OSError."""
    temporary = folder / f".{HEAD_FILE}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / HEAD_FILE)
    sync_folder(folder)


def find_end(folder: Path, keys: PublicKeys) -> End:
    """Of the log in `folder`, from its last file alone; `expertgate audit verify` reads all.

    Raises AuditError for a log that can't be continued: cut behind a signed head, broken where a
    crash can't have broken it, or without the head that `keys`, the server's own, have signed.
    """
    last = _last_of(files(folder))
    end, path = last.end, folder / HEAD_FILE
    if not path.exists():
        if last.more_than_a_start:
            raise AuditError(f"{path}: is missing, and the log was signed. {_LOOK_INTO_IT}")
        return end
    head = read_head(path)
    # One that was signed before the key was changed says nothing that could be checked here.
    if head.get("key") in keys and not keys.signed_head(head):
        raise AuditError(f"{path}: its signature doesn't hold. {_LOOK_INTO_IT}")
    seq, found = head["seq"], digest(line_of(head))
    if end.seq < seq:
        raise AuditError(
            f"{end.path or folder}: the log ends at record {end.seq}, but {HEAD_FILE} has record "
            f"{seq}: it was cut or damaged. {_LOOK_INTO_IT}"
        )
    if last.hashes.get(seq, found) != found:
        raise AuditError(
            f"{end.path}: has another record {seq} than the signed one in {HEAD_FILE}: it was "
            f"written anew. {_LOOK_INTO_IT}"
        )
    return end


@dataclass(frozen=True, slots=True)
class _Last:
    """The last file, from its first line to its end.

    `hashes`: of its records, by number. `more_than_a_start`: there are others than starts and
    heads, which are all that there is until the first head has been copied.
    """

    end: End
    hashes: Mapping[int, str]
    more_than_a_start: bool


def _last_of(paths: Sequence[Path]) -> _Last:
    if not paths:
        return _Last(End(0, GENESIS, 0, None, 0, b""), {}, False)
    path = paths[-1]
    first = first_of(path) or 0
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror or error}") from None
    seq, size, unsigned, last, more = first - 1, 0, 0, "", len(paths) > 1
    hashes: dict[int, str] = {}
    while True:
        stop = raw.find(b"\n", size)
        try:
            if stop < 0:
                break
            record = parse(raw[size:stop])
        except RecordError:
            break
        # The first line's own `prev` is taken on trust here, as all of the earlier files are.
        if record["seq"] != seq + 1 or (last and record["prev"] != last):
            break
        seq, last = seq + 1, digest(raw[size:stop])
        hashes[seq] = last
        unsigned = 0 if record["kind"] == "head" else unsigned + 1
        more = more or record["kind"] not in BY_A_START | {"head"}
        size = stop + 1
    if last:
        return _Last(End(seq, last, unsigned, path, size, raw[size:]), hashes, more)
    # Nothing in it is whole: it was begun in the moment of the crash.
    before = _last_of(paths[:-1])
    end = before.end
    if end.seq != seq or end.torn:
        raise AuditError(f"{path}: begins at record {first}, after record {end.seq}")
    return replace(before, end=replace(end, path=path, size=0, torn=raw))


def set_aside(end: End) -> Path:
    """Moves torn bytes out of the log, into a file beside it. Raises OSError."""
    assert end.path is not None
    aside = end.path.with_name(f"{end.path.name}.torn-{digest(end.torn)[:16]}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(end.torn)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(aside.parent)
    descriptor = os.open(end.path, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, end.size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return aside
