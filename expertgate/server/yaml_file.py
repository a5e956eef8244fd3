"""A YAML file of the operator's, read so that every fault has its line.

Plain data only: keys are text and stand once, there are no aliases (which can make a small file
huge), and times stay text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from expertgate.faults import Place, in_words, path_of

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

_CORE = "tag:yaml.org,2002:"
_KINDS = {"null": "a null", "bool": "a bool", "int": "an int", "float": "a float", "str": "text"}
"""Tags of scalars that become values, and how to say so."""
T = TypeVar("T")


class YamlError(ValueError):
    """What is wrong with a file: one fault a line, each with path, line and place."""


@dataclass(frozen=True, slots=True)
class YamlFile:
    path: Path
    value: Any
    """None where the file is empty."""
    lines: dict[Place, int]

    @classmethod
    def read(cls, path: Path) -> "YamlFile":
        """Raises YamlError."""
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise YamlError(f"{path}: {error.strerror or error}") from None
        return cls.parse(raw, path)

    @classmethod
    def parse(cls, raw: bytes, path: Path) -> "YamlFile":
        """Raises YamlError."""
        if len(raw) > MAX_BYTES:
            raise YamlError(f"{path}: has {len(raw)} bytes; at most {MAX_BYTES}")
        try:
            text = raw.decode()
            _check_events(text, path)
            node = yaml.compose(text, Loader=yaml.CSafeLoader)
        except UnicodeDecodeError:
            raise YamlError(f"{path}: is not UTF-8") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise YamlError(f"{path}:{line}: {_problem(error, text)}") from None
        except yaml.YAMLError as error:
            raise YamlError(f"{path}: {' '.join(str(error).split())}") from None
        lines: dict[Place, int] = {(): 1}
        value = None if node is None else _Reader(path, lines).value(node, ())
        return cls(path, value, lines)

    def validate(self, kind: type[T]) -> T:
        """The file as `kind`. Raises YamlError with every fault, from the top of the file down."""
        try:
            return TypeAdapter(kind).validate_python(self.value)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            found.sort(key=lambda fault: self._line(fault["loc"]))
            faults = [str(self.fault(fault["loc"], in_words(kind, fault))) for fault in found]
            raise YamlError("\n".join(faults)) from None

    def fault(self, place: Place, words: str) -> YamlError:
        """What is wrong with the value at `place`, with its line."""
        label = f" {path_of(place)}:" if place else ""
        return YamlError(f"{self.path}:{self._line(place)}:{label} {words}")

    def _line(self, place: Place) -> int:
        """That of the value at `place`, or of the nearest one around it that is there."""
        known = place
        while known not in self.lines:
            known = known[:-1]
        return self.lines[known]


def _check_events(text: str, path: Path) -> None:
    """Aliases and depth, before anything recursive sees the file."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        line = _line(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            raise YamlError(f"{path}:{line}: aliases are not read; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise YamlError(f"{path}:{line}: is nested more than {MAX_DEPTH} deep")


def _problem(error: yaml.MarkedYAMLError, text: str) -> str:
    """The parser's words, but where they don't say which character they are about."""
    if error.problem == "did not find expected alphabetic or numeric character":
        return "text that begins with * or & must be quoted"
    if error.problem != "found character that cannot start any token" or not error.problem_mark:
        return str(error.problem or error.context)
    # The parser doesn't count the mark that some editors begin a file with.
    char = text.removeprefix("\ufeff")[error.problem_mark.index]
    if char == "\t":
        return "a tab can't stand here; indent with blanks"
    return f"{char!r} can't stand here; quote the text that it begins"


def _line(mark: Any) -> int:
    return int(mark.line) + 1


class _Reader:
    """Makes plain values of nodes, and notes the line of each."""

    def __init__(self, path: Path, lines: dict[Place, int]) -> None:
        self._path = path
        self._lines = lines
        self._scalars = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, place: Place) -> Any:
        self._lines.setdefault(place, _line(node.start_mark))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*place, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        name = node.tag.removeprefix(_CORE)
        if name == "timestamp":
            return node.value
        place_in_file = f"{self._path}:{_line(node.start_mark)}"
        if name not in _KINDS:
            shown = f"!!{name}" if node.tag.startswith(_CORE) else node.tag
            raise YamlError(f"{place_in_file}: the tag {shown} can't be read here")
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError):  # of a tag that is written out
            shown = f"{node.value[:40]!r} can't be read as {_KINDS[name]}"
            raise YamlError(f"{place_in_file}: {shown}") from None

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            line = _line(key.start_mark)
            scalar = isinstance(key, yaml.ScalarNode)
            if not scalar or key.tag != f"{_CORE}str":
                shown = f"{key.value!r} " if scalar else ""
                raise YamlError(f"{self._path}:{line}: the key {shown}is not text; quote it")
            if key.value in found:
                raise YamlError(f"{self._path}:{line}: {key.value}: is given twice")
            self._lines[*place, key.value] = line
            found[key.value] = self.value(value, (*place, key.value))
        return found
