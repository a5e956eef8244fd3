"""`expertgate receipts`: checking what a server signed, without it."""

import json
from pathlib import Path

import click

from expertgate.server.audit import receipts as signed
from expertgate.server.audit.chain import AuditError
from expertgate.server.audit.command import DoesNotHold
from expertgate.server.audit.signing import PublicKeys

_FILE = click.Path(path_type=Path)
_MAX_BYTES = 1 << 24


@click.group()
def receipts() -> None:
    """Receipts: what each expert did for a request, signed."""


@receipts.command()
@click.argument("file", type=_FILE)
@click.option("--key", type=_FILE, required=True, help="Public keys, as for `audit verify`.")
@click.option("--principal", help="For whom it must be, by name or by salted hash.")
def verify(file: Path, key: Path, principal: str | None) -> None:
    """Check a receipt, and print what it says.

    FILE holds it, or the answer that brought it. Exit status 1 where it doesn't hold.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_BYTES).decode()
    except UnicodeDecodeError:
        raise AuditError(f"{file}: is not text") from None
    except OSError as error:
        raise AuditError(f"{file}: {error.strerror or error}") from None
    try:
        claims = signed.verify(text, PublicKeys.load(key), str(file))
    except signed.ReceiptError as error:
        raise DoesNotHold(str(error)) from None
    if principal is not None and not signed.names(claims, principal):
        raise DoesNotHold(f"{file}: is not for {principal}")
    click.echo(json.dumps(claims, indent=2, ensure_ascii=False))
