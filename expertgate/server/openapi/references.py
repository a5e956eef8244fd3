"""Schemas that refer to each other by name."""

from collections.abc import Iterator, Mapping
from typing import Any

Schema = dict[str, Any]

REFERENCE = "#/components/schemas/"


def reference(name: str) -> Schema:
    return {"$ref": f"{REFERENCE}{name}"}


def reachable(value: Any, components: Mapping[str, Schema]) -> dict[str, Schema]:
    """Those of `components` that `value` refers to, however far."""
    found: set[str] = set()
    frontier = set(references(value))
    while frontier:
        found |= frontier
        frontier = {name for known in frontier for name in references(components[known])} - found
    return {name: components[name] for name in sorted(found)}


def references(value: Any) -> Iterator[str]:
    """The names that `value` itself holds."""
    if isinstance(value, list):
        for inner in value:
            yield from references(inner)
    elif isinstance(value, dict):
        target = value.get("$ref")
        if isinstance(target, str):
            yield target.removeprefix(REFERENCE)
        for inner in value.values():
            yield from references(inner)
