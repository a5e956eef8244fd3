"""Reads a log from its end, as far back as is asked for, and as far as signatures vouch for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertgate.server.audit.chain import AuditError, RecordError, digest, parse
from expertgate.server.audit.folder import files
from expertgate.server.audit.signing import PublicKeys
from expertgate.server.audit.writer import Written


def lately(folder: Path, keys: PublicKeys) -> Iterator[tuple[dict[str, Any], Written]]:
    """Each record and its place, newest first, as far as heads that one of `keys` signed vouch.

    What stands behind the last head is left out, and so is what stood there when a server started
    after a crash: whoever can write to the folder could have written it, and later heads sign over
    it all the same. It ends where a line isn't the one that the next names.

    Raises AuditError.
    """
    wanted, vouched = "", False
    for path in reversed(files(folder)):
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise AuditError(f"{path}: {error.strerror or error}") from None
        for line in reversed(raw.splitlines()):
            found = digest(line)
            if wanted and found != wanted:
                return
            try:
                record = parse(line)
            except RecordError:
                continue  # torn, and so behind the last head: every other line has its hash checked
            vouched = vouched or (record["kind"] == "head" and keys.signed_head(record))
            if not vouched and not wanted:
                continue
            wanted = record["prev"]
            if vouched:
                yield record, Written(record["seq"], found)
            vouched = vouched and record["kind"] != "start"
