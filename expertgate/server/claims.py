"""What a credential says of its holder, and which groups that stands for by the configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

from expertgate.server.identity_config import GroupRule
from expertgate.server.names import MAX_CHARS


class ClaimError(ValueError):
    """Something that can't be read as what it should be; what the credential has, or lacks."""


def groups_of(rules: Sequence[GroupRule], claims: Mapping[str, Any]) -> frozenset[str]:
    """Without rules, none. Raises ClaimError: left out, a `forbid` might have depended on it."""
    return frozenset(group for rule in rules for group in _groups(rule, claims))


def at(claims: Mapping[str, Any], path: Sequence[str]) -> Any:
    """What stands at the end of `path`; None where the way ends. Raises ClaimError for no way."""
    found: Any = claims
    for name in path:
        if found is None:
            return None
        if not isinstance(found, dict):
            raise ClaimError(f"has no claims within another on the way to {shown(path)}")
        found = found.get(name)
    return found


def is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_CHARS and text.isprintable()


def shown(path: Sequence[str]) -> str:
    return "claim " + " → ".join(path)


def _groups(rule: GroupRule, claims: Mapping[str, Any]) -> list[str]:
    found = at(claims, rule.claim)
    values = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ClaimError(f"has no text or list of texts in {shown(rule.claim)}")
    if rule.values is not None:
        return [rule.values[value] for value in values if value in rule.values]
    groups = [rule.prefix + value for value in values]
    if not all(map(is_name, groups)):
        raise ClaimError(f"has a name that can't be a group in {shown(rule.claim)}")
    return groups
