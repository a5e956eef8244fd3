"""A Dockerfile read as far as ours needs it: stages, and the instructions of each in order."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Stage:
    image: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        """What follows each `name` in it, continuation lines joined."""
        return [rest for word, rest in self.instructions if word == name]

    def command(self, name: str) -> list[str]:
        """The last `name`, which must be in its exec form."""
        found: list[str] = json.loads(self.all(name)[-1])
        return found

    def pairs(self, name: str) -> dict[str, str]:
        """All `key=value` of every `name`."""
        return dict(word.split("=", 1) for rest in self.all(name) for word in shlex.split(rest))


def read(path: Path) -> list[Stage]:
    stages: list[Stage] = []
    for word, rest in _instructions(path.read_text()):
        if word == "FROM":
            stages.append(Stage(rest))
        elif stages:
            stages[-1].instructions.append((word, rest))
    return stages


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            yield word, rest.strip()
