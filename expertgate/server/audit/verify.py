"""Reads a log as a stranger would, with the public key alone, and says what doesn't hold.

What this can't see: whether records behind the last signed head were cut off or rewritten by
somebody who can write to the folder, nor that the folder was put back to an earlier state of
itself, unless a head that was kept elsewhere says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertgate.server.audit.chain import (
    BY_A_START,
    GENESIS,
    AuditError,
    RecordError,
    check_canonical,
    digest,
    line_of,
    parse,
    shown,
)
from expertgate.server.audit.folder import HEAD_FILE, files, first_of, lines, read_head
from expertgate.server.audit.signing import PublicKeys

_MAX_FAULTS = 20


@dataclass(slots=True)
class Report:
    """What was read. `faults`: one line each, with file and line; none means that it holds.

    `heads`: signed heads whose signature was checked and holds; `unsigned`: records after the
    last head; `notes`: what is no fault, and should be known.
    """

    files: int = 0
    records: int = 0
    first: int = 0
    last: int = 0
    first_time: str = ""
    last_time: str = ""
    heads: int = 0
    unsigned: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    path: Path, keys: PublicKeys | None, *, first: int = 1, head: Path | None = None
) -> Report:
    """Of a folder or one file. `first`: the record to begin at; `head`: one kept elsewhere.

    Raises AuditError where there is nothing to read.
    """
    paths = [path] if path.is_file() else files(path)
    if not paths:
        raise AuditError(f"{path}: has no log: its files are called {1:016}.jsonl and so on")
    report = Report(files=len(paths))
    # Before the log: a server that is running may sign another meanwhile.
    own = path / HEAD_FILE
    kept = [_Kept.read(file) for file in ([own] if own.exists() else []) + ([head] if head else [])]
    reader = _Reader(report, keys, first, {one.head["seq"]: "" for one in kept})
    for file in paths:
        reader.read(file)
        if len(report.faults) >= _MAX_FAULTS:
            report.faults = report.faults[:_MAX_FAULTS]
            report.notes.append(f"there may be more: stopped after {_MAX_FAULTS} faults")
            return report
    reader.end(paths[-1])
    for one in kept:
        _check_kept(one, report, reader.anchors, keys)
    if keys is not None and reader.bare and not any(_near(one, report) for one in kept):
        report.faults.append(
            f"{path}: no signed head is in it or just before it, so anybody could have written it; "
            "one that was kept elsewhere (--head) can vouch for what follows it"
        )
    if path.is_dir() and reader.saw_head and own not in (one.path for one in kept):
        report.faults.append(f"{own}: is missing; the server keeps its last head there")
    return report


@dataclass(frozen=True, slots=True)
class _Kept:
    """A signed head that stands in a file of its own."""

    path: Path
    head: dict[str, Any]
    hash: str

    @classmethod
    def read(cls, path: Path) -> "_Kept":
        head = read_head(path)
        return cls(path, head, digest(line_of(head)))


class _Reader:
    def __init__(
        self, report: Report, keys: PublicKeys | None, first: int, anchors: dict[int, str]
    ) -> None:
        self.saw_head = False
        self.anchors = anchors
        """Records that were signed, by number; each gets the hash that is found for it."""
        self._report = report
        self._keys = keys
        self._first = self._seq = first
        # What came before another first record is on other disks; its hash is taken on trust,
        # until a signed head covers it.
        self._hash: str | None = GENESIS if first == 1 else None
        self._every: int | None = None
        self._unsigned = 0  # since the last head, but for what a start writes
        self._starts = 0  # since the last head

    @property
    def bare(self) -> bool:
        """There are records, and no head among them."""
        return not self.saw_head and self._unsigned > 0

    def read(self, path: Path) -> None:
        report = self._report
        for number, raw in lines(path):
            line = raw.removesuffix(b"\n")
            place = f"{path}:{number}"
            if not raw.endswith(b"\n"):
                report.faults.append(f"{place}: the file ends in the middle of a record")
            try:
                record = parse(line)
                check_canonical(record, line)
            except RecordError as error:
                report.faults.append(f"{place}: {error}")
                self._seq, self._hash = self._seq + 1, None
            else:
                self._check(record, line, place)
                if number == 1 and first_of(path) not in (None, record["seq"]):
                    report.faults.append(
                        f"{place}: begins with record {record['seq']}, unlike the file's name"
                    )
            if len(report.faults) >= _MAX_FAULTS:
                return

    def end(self, path: Path) -> None:
        if self._report.records == 0:
            self._report.faults.append(f"{path}: has no record")

    def _check(self, record: dict[str, Any], line: bytes, place: str) -> None:
        report, seq = self._report, record["seq"]
        if seq > self._seq:
            report.faults.append(f"{place}: {_records(self._seq, seq - 1)} missing before this one")
        elif seq < self._seq:
            report.faults.append(
                f"{place}: record {seq} is out of its order, or stands here again; "
                f"record {self._seq} should be here"
            )
        elif self._hash is not None and record["prev"] != self._hash:
            report.faults.append(
                f"{place}: record {seq} doesn't follow from record {seq - 1}: one of the two was "
                "changed"
            )
        self._seq, self._hash = seq + 1, digest(line)
        if seq in self.anchors:
            self.anchors[seq] = self._hash
        if not report.records:
            report.first, report.first_time = seq, record["time"]
            if seq - 1 in self.anchors:
                self.anchors[seq - 1] = record["prev"]
        report.records += 1
        report.last, report.last_time = seq, record["time"]
        if record["kind"] == "head":
            self._check_head(record, place)
        else:
            report.unsigned += 1
            if record["kind"] == "start":
                self._check_left(place)
                self._starts += 1
            # A server that starts may have been told another number, so only its head counts.
            self._unsigned += record["kind"] not in BY_A_START
            if self._every is not None and self._unsigned == self._every + 1:
                self._miss_head(place, self._every)
        if record["kind"] == "recovered":
            report.notes.append(
                f"{place}: a crash tore {shown(record.get('torn_bytes'))} bytes after record "
                f"{shown(record.get('after'))}; they are kept as {shown(record.get('kept_as'))}"
            )
        if record["kind"] == "gap":
            report.notes.append(
                f"{place}: for a while nothing could be written; {shown(record.get('lost'))} "
                "records are lost"
            )

    def _check_left(self, place: str) -> None:
        """What was not signed when a server started, and stands under its signature since."""
        if self._unsigned and self._every is None and self._first == 1:
            self._report.faults.append(
                f"{place}: no signed head before this start, and a server signs as soon as it "
                f"first starts: the {self._unsigned} records before it were not written by one"
            )
            return
        # What tells of a crash or a failed disk has a note of its own.
        if left := self._unsigned + self._starts:
            were = "was" if left == 1 else "were"
            self._report.notes.append(
                f"{place}: {_counted(left, 'record')} before this start {were} not signed yet, as "
                "after a crash: whoever could write to the folder then could have written that"
            )

    def _miss_head(self, place: str, every: int) -> None:
        self._report.faults.append(
            f"{place}: no signed head for {every} records, and there should be one: "
            "what follows the last was not written by the server"
        )

    def _check_head(self, record: dict[str, Any], place: str) -> None:
        self.saw_head = True
        report = self._report
        every = record.get("every")
        if self._every is None and isinstance(every, int) and self._unsigned > every:
            self._miss_head(place, every)
        report.unsigned = self._unsigned = self._starts = 0
        self._every = every if isinstance(every, int) else None
        if self._keys is None:
            return
        if (wrong := _unsigned(record, self._keys)) is not None:
            report.faults.append(f"{place}: {wrong}")
        else:
            report.heads += 1


def _unsigned(head: Mapping[str, Any], keys: PublicKeys) -> str | None:
    """What is wrong with the signature of a head."""
    if head.get("key") not in keys:
        return f"the head is signed by another key, {shown(head.get('key'))}"
    return None if keys.signed_head(head) else "the signature of this head doesn't hold"


def _near(kept: _Kept, report: Report) -> bool:
    """Whether it signs what was read, or the record that the first one names."""
    return bool(kept.head["seq"] >= report.first - 1)


def _check_kept(
    kept: _Kept, report: Report, found: Mapping[int, str], keys: PublicKeys | None
) -> None:
    seq = kept.head["seq"]
    if keys is not None and (wrong := _unsigned(kept.head, keys)) is not None:
        report.faults.append(f"{kept.path}: {wrong}")
    elif seq > report.last:
        report.faults.append(
            f"{kept.path}: record {seq} was signed, but the log ends at record {report.last}: "
            "its end was cut off"
        )
    elif _near(kept, report) and found[seq] != kept.hash:
        report.faults.append(f"{kept.path}: the log has another record {seq} than this signed one")


def _records(first: int, last: int) -> str:
    return f"record {first} is" if first == last else f"records {first} to {last} are"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def in_words(report: Report, *, checked: bool) -> list[str]:
    """What holds, as lines. `checked`: signatures were."""
    records, files = _counted(report.records, "record"), _counted(report.files, "file")
    hold = "hold" if report.heads != 1 else "holds"
    since = _counted(report.unsigned, "record")
    return [
        f"{records} in {files}: {report.first} to {report.last}",
        f"from {shown(report.first_time)} to {shown(report.last_time)}",
        f"{_counted(report.heads, 'signature')} {hold}; {since} since the last head"
        if checked
        else "NO SIGNATURE WAS CHECKED, and anybody can make a chain: name the public key by --key",
        *report.notes,
    ]
