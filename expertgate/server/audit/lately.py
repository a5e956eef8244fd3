"""Reads a log from its end, as far back as is asked for, and as far as signatures vouch for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertgate.server.audit.chain import RecordError, digest, parse
from expertgate.server.audit.folder import files
from expertgate.server.audit.signing import PublicKeys
from expertgate.server.audit.writer import Written


def lately(folder: Path, keys: PublicKeys) -> Iterator[tuple[dict[str, Any], Written]]:
    """Each record and its place, newest first, from the newest head that one of `keys` signed.

    What stands behind that head is left out: whoever can write to the folder can write there. It
    ends where a line isn't the one that the next names. Raises AuditError and OSError.
    """
    wanted = ""
    for path in reversed(files(folder)):
        for line in reversed(path.read_bytes().splitlines()):
            found = digest(line)
            if wanted and found != wanted:
                return
            try:
                record = parse(line)
            except RecordError:
                continue  # torn, and so behind the last head: every other line has its hash checked
            if not wanted and not (record["kind"] == "head" and keys.signed_head(record)):
                continue
            wanted = record["prev"]
            yield record, Written(record["seq"], found)
