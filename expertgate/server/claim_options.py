"""Claims on the command line: which there are, and what a principal's are."""

from collections.abc import Iterable, Mapping
from typing import get_args

import click
from pydantic import TypeAdapter, ValidationError

from expertgate.policies.context import ClaimKind
from expertgate.server.config import ClaimName

_DECLARED = TypeAdapter(dict[ClaimName, ClaimKind])
_BOOLEANS = {"true": True, "false": False}


def declared(texts: Iterable[str]) -> dict[str, ClaimKind]:
    """Of `NAME:TYPE` each. Raises click.BadParameter."""
    found: dict[str, ClaimKind] = {}
    for text in texts:
        name, _, kind = text.rpartition(":")  # many names are addresses, with a colon in them
        try:
            one = _DECLARED.validate_python({name: kind})
        except ValidationError:
            kinds = ", ".join(get_args(ClaimKind))
            raise _wrong("--claims", f"{text!r} is not NAME:TYPE, of {kinds}") from None
        if found.get(name, kind) != kind:
            raise _wrong("--claims", f"the claim {name!r} is declared twice, as {found[name]} too")
        found |= one
    return found


def given(texts: Iterable[str], kinds: Mapping[str, ClaimKind]) -> dict[str, object]:
    """Of `NAME=VALUE` each, by the claims that are declared. Raises click.BadParameter."""
    found: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise _wrong("--claim", f"{text!r} is not NAME=VALUE")
        if name not in kinds:
            known = (
                f"only {', '.join(kinds)}" if kinds else "and no other is; --claims declares one"
            )
            raise _wrong("--claim", f"the claim {name!r} is not declared, {known}")
        if name in found:
            raise _wrong("--claim", f"the claim {name!r} is given twice")
        try:
            found[name] = _value(value, kinds[name])
        except (KeyError, ValueError):
            raise _wrong("--claim", f"{text!r} is not of the type {kinds[name]}") from None
    return found


def _wrong(option: str, words: str) -> click.BadParameter:
    return click.BadParameter(words, param_hint=f"'{option}'")


def _value(text: str, kind: ClaimKind) -> object:
    """Raises KeyError or ValueError."""
    if kind == "integer":
        return int(text)
    if kind == "boolean":
        return _BOOLEANS[text]
    return text.split(",") if kind == "strings" else text
