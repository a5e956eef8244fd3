"""Who asks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever a credential belongs to; the same whether it was a key, a token or a gateway's word.

    `claims` are strings, numbers, booleans or lists of strings that policies may read. `via` says
    what vouches for all this, such as `key`.
    """

    id: str
    groups: frozenset[str] = frozenset()
    claims: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    via: str = ""
