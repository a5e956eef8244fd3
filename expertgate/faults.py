"""What pydantic finds wrong with a file of the operator's, in an operator's words."""

import difflib
import re
from types import UnionType
from typing import Any, get_args

_WORDS = {
    "missing": "is missing",
    "dict_type": "must be a mapping, as {key: value}",
    "mapping_type": "must be a mapping, as {key: value}",
    "list_type": "must be a list, as [a, b]",
    "tuple_type": "must be a list, as [a, b]",
    "frozen_set_type": "must be a list, as [a, b]",
    "string_type": "must be text; quote what looks like a number",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number, without quotes",
    "path_type": "must be text, a path",
}
"""Pydantic's types of faults, and what it says of them in words of Python's."""

Place = tuple[str | int, ...]
"""Keys and indices, from the outside in."""


def in_words(kind: Any, fault: Any) -> str:
    """`fault`: one of pydantic's, of a value that should be of `kind`."""
    place: Place = fault["loc"]
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1]), _fields(kind, place[:-1]), n=1)
        return "unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if fault["type"] in ("model_type", "model_attributes_type"):
        return f"must be a mapping of {', '.join(_fields(kind, place))}"
    if fault["type"] in _WORDS:
        return _WORDS[fault["type"]]
    words = str(fault["msg"]).removeprefix("Value error, ")
    return re.sub("^(Input|String) should ", "must ", words)


def path_of(place: Place) -> str:
    """As `experts[0].name`."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return path.lstrip(".")


def _fields(kind: Any, place: Place) -> list[str]:
    """The keys of the model that stands at `place` in a value of `kind`."""
    for part in place:
        if isinstance(part, int):
            kind = get_args(kind)[0]
        elif hasattr(kind, "model_fields"):
            kind = kind.model_fields[part].annotation
        else:  # a mapping's values
            kind = get_args(kind)[1]
        if isinstance(kind, UnionType):  # with None
            kind = get_args(kind)[0]
    return list(kind.model_fields)
