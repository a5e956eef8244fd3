"""Who asks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever a credential belongs to; the same whether it was a key, a token or a gateway's word.

    `claims` are strings, numbers, booleans or lists of strings that policies may read. `via` says
    what vouches for all this, such as `key`. `expires`: when that ends by itself; it says nothing
    of who asks, so two that differ in it alone are equal.
    """

    id: str
    groups: frozenset[str] = frozenset()
    claims: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    via: str = ""
    expires: datetime | None = field(default=None, compare=False)
