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


@pytest.mark.parametrize(
    ("key", "value"),
    re.findall(r"^(?:  )?(\w+): (\S+) +# default(?:[;, ].*)?$", EXAMPLE, re.MULTILINE),
)
def test_what_is_called_a_default_is_one(tmp_path, key, value):
    path = tmp_path / "expertgate.yaml"
    path.write_text("identity: {api_keys: keys.yaml}\npolicies: policies\n")
    config = Config.load(path)
    [place] = [part for part in (config, config.audit, config.identity) if hasattr(part, key)]
    found, shown = getattr(place, key), yaml.safe_load(value)
    assert found == (tmp_path / shown if isinstance(found, Path) else shown)


def test_every_command_is_named():
    rows = "".join(re.findall(r"^\| `[^|]*\|", PAGE, re.MULTILINE))
    for name, command in cli.commands.items():
        assert f"`{name}" in rows
        if isinstance(command, click.Group):
            assert all(re.search(rf"\b{below}`", rows) for below in command.commands), name
