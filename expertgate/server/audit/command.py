"""`expertgate audit`: making a signing key, and checking a log."""

import json
from pathlib import Path

import click

from expertgate.server.audit.signing import PublicKeys, SigningKey, jwks_of
from expertgate.server.audit.verify import in_words
from expertgate.server.audit.verify import verify as verify_log

_FILE = click.Path(path_type=Path)


class DoesNotHold(click.ClickException):
    """Something that was checked doesn't hold; one line for each fault."""

    exit_code = 1


@click.group()
def audit() -> None:
    """The audit log: its signing key, and whether it holds."""


@audit.command()
@click.argument("file", type=_FILE, default="audit-key.pem")
def keygen(file: Path) -> None:
    """Make a signing key, and print its public half.

    In FILE (default: audit-key.pem). The server makes one by itself where there is none.
    """
    _print_public(SigningKey.create(file))


@audit.command("public-key")
@click.argument("file", type=_FILE, default="audit-key.pem")
def public_key(file: Path) -> None:
    """Print the public half of a signing key.

    Of that in FILE (default: audit-key.pem), as a set of JSON Web Keys.
    """
    _print_public(SigningKey.load(file))


@audit.command()
@click.argument("path", type=_FILE)
@click.option("--key", type=_FILE, help="Public keys: PEM, or as /.well-known/expertgate-keys.")
@click.option("--head", type=_FILE, help="A head.json kept elsewhere, which the log must contain.")
@click.option(
    "--from",
    "first",
    type=click.IntRange(1),
    default=1,
    help="The record to begin at, where the files before it are elsewhere.",
)
def verify(path: Path, key: Path | None, head: Path | None, first: int) -> None:
    """Check a log: the folder PATH, or one file of it.

    Exit status 1 where it doesn't hold.
    """
    report = verify_log(path, None if key is None else PublicKeys.load(key), first=first, head=head)
    if report.faults:
        raise DoesNotHold("\n".join([*report.faults, *report.notes]))
    click.echo("\n".join(in_words(report, checked=key is not None)))


def _print_public(key: SigningKey) -> None:
    click.echo(json.dumps(jwks_of(key), indent=2))
