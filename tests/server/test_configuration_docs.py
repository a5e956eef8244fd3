"""docs/configuration.md shows every key there is, with its default, and every command."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import yaml
from pydantic import BaseModel

from expertgate.server.cli import cli
from expertgate.server.config import Config

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
[EXAMPLE] = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def keys_of(kind: Any) -> Iterator[tuple[str, ...]]:
    """The way to every key of a model, and of those within it; `*` is any name."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield (name,)
            yield from ((name, *below) for below in keys_of(field.annotation))
        return
    inner = get_args(kind)
    chosen = ("*",) if getattr(kind, "__origin__", None) is dict else ()
    for part in inner:
        yield from ((*chosen, *below) for below in keys_of(part))


def keys_in(value: Any) -> Iterator[tuple[str, ...]]:
    if isinstance(value, list):
        for item in value:
            yield from keys_in(item)
    if isinstance(value, dict):
        for name, below in value.items():
            yield (name,)
            yield from ((name, *way) for way in keys_in(below))


def test_every_key_is_shown_and_no_other():
    known = set(keys_of(Config))
    assert {("limits", "*", "concurrent"), ("identity", "jwt", "groups", "prefix")} <= known
    shown = set(keys_in(yaml.safe_load(EXAMPLE)))
    assert known - shown == set()
    # `*` stands for any name; what is in a group's `values`, and the engine's, is not ours.
    ours = {way for way in shown if way[0] not in ("engine", "claims", "limits")}
    assert {way for way in ours if "values" not in way[:-1]} - known == set()


def lines_of_defaults() -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Of each line that speaks of a default: the way to its key, its value, and what it says."""
    way: list[tuple[int, str]] = []
    for line in EXAMPLE.splitlines():
        # A dash stands where an entry of a list begins, and its keys two columns further.
        found = re.fullmatch(r"([ -]*)([^\s:]+):(?: +(.*?))??(?: +# (.*))?", line)
        if found is None:
            continue
        depth, key, value, words = len(found[1]), found[2], found[3] or "", found[4] or ""
        way = [*((d, k) for d, k in way if d < depth), (depth, key)]
        if said := re.search(r"\bdefault\b(?:: (\w+))?", words):
            yield tuple(k for _, k in way), value, said[1] or ""


def default_of(way: tuple[str, ...]) -> Any:
    """Of a key whose way is known."""
    kind: Any = Config
    for name in way[:-1]:
        kind = next(_models(kind.model_fields[name].annotation))
    return kind.model_fields[way[-1]].get_default(call_default_factory=True)


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from _models(part)


DEFAULTS = list(lines_of_defaults())


def test_defaults_are_found_wherever_they_stand():
    ways = {way for way, _, _ in DEFAULTS}
    assert {("port",), ("audit", "path"), ("identity", "jwt", "leeway_s"), ("engine",)} <= ways


@pytest.mark.parametrize(("way", "value", "said"), DEFAULTS, ids=lambda part: str(part))
def test_what_is_called_a_default_is_one(way, value, said):
    found = default_of(way)
    if said:  # the example shows another value, and what is so without the key stands in words
        assert not found or said != "none", found
        return
    shown = yaml.safe_load(value)
    if isinstance(found, Path):
        assert str(found) == shown
    elif isinstance(found, tuple):
        assert list(found) == (shown if isinstance(shown, list) else [shown])
    else:
        assert found == shown


def test_every_command_is_named():
    cells = re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE)
    rows = {words[0]: words[1:] for words in (re.sub(r"[`,]", " ", cell).split() for cell in cells)}
    assert rows.keys() == cli.commands.keys()
    for name, command in cli.commands.items():
        if isinstance(command, click.Group):
            assert sorted(rows[name]) == sorted(command.commands), name
