"""Small logs for the tests of this folder."""

import json
from pathlib import Path

from expertgate.server.audit.signing import PublicKeys, SigningKey
from expertgate.server.audit.verify import Report, verify
from expertgate.server.audit.writer import AuditLog, Written

RECORDED = Written(seq=1, hash="0" * 64)
"""The place of a request in some log."""


def signing_key(folder: Path) -> SigningKey:
    path = folder / "key.pem"
    return SigningKey.load(path) if path.exists() else SigningKey.create(path)


def public_keys(folder: Path) -> PublicKeys:
    return signing_key(folder).public


def open_log(folder: Path, *, rotate_bytes=1 << 20, sign_every=5, fail_open=False) -> AuditLog:
    return AuditLog(
        folder / "audit",
        signing_key(folder),
        rotate_bytes=rotate_bytes,
        sign_every=sign_every,
        fail_open=fail_open,
    )


def write_log(folder: Path, records: int, **options) -> Path:
    """A log that was closed in order."""
    log = open_log(folder, **options)
    for number in range(records):
        log.record("request", request=f"r{number}")
    log.close()
    return folder / "audit"


def check(folder: Path, **options) -> Report:
    return verify(folder / "audit", public_keys(folder), **options)


def records(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for path in sorted((folder / "audit").glob("*.jsonl"))
        for line in path.read_bytes().splitlines()
    ]
