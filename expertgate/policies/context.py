"""The circumstances of a request, as policies see them.

| attribute | type | |
| --- | --- | --- |
| `context.purpose` | String, optional | what the client says that it asks for |
| `context.time` | datetime | when the request came, in whole seconds |
| `context.weekday` | Long | 1 is Monday, 7 is Sunday, both UTC, as `time` is |
| `context.address` | ipaddr, optional | the client's end of the connection |
| `context.claims` | record | of the principal's token, those that are declared |
"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Literal

from expertgate.policies.principal import Principal

ClaimKind = Literal["string", "integer", "boolean", "strings"]

ATTRIBUTES: Mapping[str, str] = {
    "purpose": "purpose?: String",
    "time": "time: __cedar::datetime",
    "weekday": "weekday: Long",
    "address": "address?: __cedar::ipaddr",
    "claims": "claims: {{{}}}",
}
"""Each attribute, and how Cedar's schema declares it; `{}` is where the claims go."""

_CEDAR_TYPES: Mapping[ClaimKind, str] = {
    "string": "String",
    "integer": "Long",
    "boolean": "Bool",
    "strings": "Set<String>",
}
_INT64_END = 1 << 63


class ContextError(ValueError):
    """Circumstances that can't be put to the policies, so that none can permit anything."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a decision may depend on besides the principal and the expert.

    `address` is the client's as the connection itself shows it, never what a header says.
    """

    time: datetime
    purpose: str | None = None
    address: IPv4Address | IPv6Address | None = None

    @classmethod
    def now(cls, purpose: str | None = None, address: str | None = None) -> "Context":
        """`address` may be anything; one that is no IP address is none."""
        return cls(datetime.now(UTC), purpose, ip_address(address))


def ip_address(text: str | None) -> IPv4Address | IPv6Address | None:
    """An address as policies compare it: IPv4 where it is one in disguise, and without a zone."""
    for kind in (IPv4Address, IPv6Address):
        try:
            found: IPv4Address | IPv6Address = kind(text or "")
        except ValueError:
            continue
        if isinstance(found, IPv6Address):
            # Sockets that speak both show IPv4 as ::ffff:10.0.0.1; Cedar reads no such thing.
            found = found.ipv4_mapped or IPv6Address(int(found))
        return found
    return None


def declaration(attributes: Set[str], claims: Mapping[str, ClaimKind]) -> str:
    """The context's type in Cedar's schema, with those of its attributes that are in `attributes`.

    A claim is optional whatever it is, because a principal with an API key has none.
    """
    # JSON escapes quotes and backslashes as Cedar does.
    named = [f"{json.dumps(name)}?: {_CEDAR_TYPES[kind]}" for name, kind in sorted(claims.items())]
    inner = ", ".join(named)
    parts = [ATTRIBUTES[name].format(inner) for name in ATTRIBUTES if name in attributes]
    return "{ " + ", ".join(parts) + " }"


def record(
    context: Context,
    principal: Principal,
    attributes: Set[str],
    claims: Mapping[str, ClaimKind],
) -> dict[str, Any]:
    """The context in Cedar's JSON form. Raises ContextError for a claim of another type."""
    moment = context.time.astimezone(UTC)
    found: dict[str, Any] = {
        "purpose": context.purpose,
        "time": f"{moment.replace(tzinfo=None).isoformat(timespec='seconds')}Z",
        "weekday": moment.isoweekday(),
        "address": None if context.address is None else str(context.address),
    }
    found = {k: v for k, v in found.items() if k in attributes and v is not None}
    if "claims" in attributes:
        found["claims"] = {
            name: _claim(name, kind, principal.claims[name])
            for name, kind in claims.items()
            if name in principal.claims
        }
    return found


def _claim(name: str, kind: ClaimKind, value: object) -> object:
    if kind == "string" and isinstance(value, str):
        return value
    if kind == "boolean" and isinstance(value, bool):
        return value
    if kind == "integer" and type(value) is int and -_INT64_END <= value < _INT64_END:
        return value
    if kind == "strings" and isinstance(value, Sequence | Set) and not isinstance(value, str):
        texts = [item for item in value if isinstance(item, str)]
        if len(texts) == len(value):
            return sorted(texts)
    # The value itself stays out of logs.
    raise ContextError(f"the claim {name!r} is not of the type {kind}, as which it is declared")
