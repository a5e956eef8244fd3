"""One policy as it stands in a file, with its place.

Cedar's Python binding names policies by number and gives no lines, and its native parser takes
the process down on deep nesting; so files are cut into policies here, and measured, before that.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cedarpy

MAX_DEPTH = 64
"""Brackets within brackets. Cedar's parser overflows the stack somewhere below 3,000."""
MAX_TOKENS = 4096
"""Of one policy. Operators nest in the syntax tree as well, and overflow it below 30,000 terms."""

_TOKEN = re.compile(
    r"""(?P<blank>\s+|//[^\n\r]*)|"(?:\\.|[^"\\])*"|[A-Za-z_]\w*|\d+|::|[=!<>]=|&&|\|\||.""",
    re.DOTALL,
)
_UNEXPECTED = "unexpected token"
_ENTITIES = ("principal", "resource")
_SIGNS = ("==", "!=", "in", "is")


class PolicyError(ValueError):
    """Policies that can't be put in force: each fault in one line, with its file and line."""


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    line: int
    end: int
    """Where it ends in the text of its statement."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One `permit` or `forbid` up to its semicolon; `place` is the file and line it begins on."""

    text: str
    file: Path
    tokens: tuple[Token, ...]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.tokens[0].line}"

    @property
    def id(self) -> str:
        """The `@id` of the policy, else its file's name and its line."""
        return self.given_id() or f"{self.file.name}:{self.tokens[0].line}"

    def given_id(self) -> str | None:
        """The `@id` of the policy. Raises PolicyError for one that is empty or not printable."""
        words = [token.text for token in self.tokens]
        for start, word in enumerate(words):
            if word == "@" and words[start + 1 : start + 2] == ["id"]:
                value = words[start + 3].strip('"') if words[start + 2] == "(" else ""
                if not value or not value.isprintable() or "\\" in value:
                    raise PolicyError(
                        f"{self.file}:{self.tokens[start].line}: an @id is printable text "
                        'without backslashes, such as @id("research-may-read")'
                    )
                return value
        return None

    def named(self, kind: str) -> Iterator[tuple[str, str]]:
        """Place and name of every `kind::"name"` in the policy."""
        for start, token in enumerate(self.tokens[:-2]):
            sign, name = self.tokens[start + 1 : start + 3]
            if token.text == kind and sign.text == "::" and name.text.startswith('"'):
                yield f"{self.file}:{name.line}", name.text[1:-1]

    def values(self) -> Iterator[tuple[str, str, str]]:
        """Place, attribute and text, where an attribute of an expert is compared with a text.

        By `==` or `!=`, either way round, or `contains`, `containsAll` or `containsAny`. Not such
        texts as are written with an escape.
        """
        words = ["", "", *(token.text for token in self.tokens), *[""] * 8]
        for start, token in enumerate(self.tokens, 2):
            resource, dot, attribute = words[start : start + 3]
            if resource != "resource" or dot not in (".", "["):
                continue
            end = start + 3
            if dot == "[":  # resource["owner"]
                attribute, end = attribute.strip('"'), end + 1
            sign, other = words[end : end + 2]
            texts = []
            if sign in ("==", "!="):
                texts = [other]
            elif words[start - 1] in ("==", "!="):
                texts = [words[start - 2]]
            elif sign == "." and other.startswith("contains"):
                behind = words[end + 2 :]
                texts = behind[: behind.index(")")] if ")" in behind else []
            for text in texts:
                if text.startswith('"') and "\\" not in text:
                    yield f"{self.file}:{token.line}", attribute, text[1:-1]

    def compared(self) -> Iterator[tuple[str, str, str, str]]:
        """Every comparison of a variable with entities, `principal in Group::"x"` or the reverse.

        Its place, the variable, the sign and the type of the entities.
        """
        words = [token.text for token in self.tokens] + [""] * 4
        for start, token in enumerate(self.tokens):
            place = f"{self.file}:{token.line}"
            if words[start] in _ENTITIES:
                sign, *names = words[start + 1 : start + 5]
                kind = names[1] if names[0] in ("[", "(") else names[0]
                if sign in _SIGNS and kind[:1].isupper():
                    yield place, words[start], sign, kind
            kind, dots, _, sign, variable = words[start : start + 5]
            if dots == "::" and sign in ("==", "!=", "in") and variable in _ENTITIES:
                # Nothing is in a user or an expert but itself.
                yield place, variable, sign.replace("in", "=="), kind

    def equals_networks(self) -> Iterator[tuple[str, str]]:
        """Place and text of every network, `ip("10.0.0.0/8")`, that something is to be equal to."""
        words = [token.text for token in self.tokens] + [""] * 4
        for start, token in enumerate(self.tokens):
            name, bracket, text = words[start : start + 3]
            network, slash, length = text.strip('"').partition("/")
            whole = not slash or length == ("128" if ":" in network else "32")
            beside = {words[start - 1], words[start + 4]}
            if (name, bracket) == ("ip", "(") and not whole and beside & {"==", "!="}:
                yield f"{self.file}:{token.line}", f"{network}/{length}"

    def exceptions(self) -> Iterator[tuple[str, int, int]]:
        """Every `unless`: its place, and where its condition begins and ends in the text."""
        words = [token.text for token in self.tokens]
        for start, word in enumerate(words):
            if word == "unless" and words[start + 1] == "{":
                depth = 0
                for token in self.tokens[start + 1 :]:
                    depth += (token.text == "{") - (token.text == "}")
                    if not depth:
                        place = f"{self.file}:{self.tokens[start].line}"
                        yield place, self.tokens[start + 1].end, token.end - 1
                        break

    def asked_for(self) -> Iterator[tuple[str, tuple[str, ...], str]]:
        """Every attribute that a `has` asks for: its place, the way to what may have it, its name.

        The way is empty where it begins with something else than a variable.
        """
        words = [token.text for token in self.tokens]
        for start, word in enumerate(words):
            if word != "has" or words[start - 1] == "@":
                continue
            way = _way(words[:start])
            names = self.tokens[start + 1 :]
            for index in range(0, len(names), 2):  # `has a.b` asks for both
                name = names[index].text.removeprefix('"').removesuffix('"')
                yield f"{self.file}:{names[index].line}", way, name
                way = (*way, name) if way else ()
                if [token.text for token in names[index + 1 : index + 2]] != ["."]:
                    break

    def check(self) -> None:
        """Raises PolicyError where this is too deep or too long to parse, or is not one policy."""
        depth = 0
        for token in self.tokens:
            depth += (token.text in "([{") - (token.text in ")]}")
            if depth > MAX_DEPTH:
                raise PolicyError(
                    f"{self.file}:{token.line}: brackets are nested more than {MAX_DEPTH} deep"
                )
        if len(self.tokens) > MAX_TOKENS:
            raise PolicyError(
                f"{self.place}: the policy has {len(self.tokens)} words and signs; "
                f"at most {MAX_TOKENS}, so write it as several"
            )
        try:
            parsed = cedarpy.PolicySet.from_str(self.text)
        except ValueError as error:
            words = " ".join(str(error).split())
            if words == "unexpected end of input":
                words += "; a policy ends with a semicolon"
            line = self._unexpected_line(str(error)) or self.tokens[0].line
            raise PolicyError(f"{self.file}:{line}: {words}") from None
        if parsed.templates():
            raise PolicyError(
                f"{self.place}: ?principal and ?resource make a template, which permits nothing "
                "by itself; write out whom it is about"
            )
        if len(parsed) != 1:
            raise PolicyError(f"{self.place}: this is not one policy but {len(parsed)}")

    def _unexpected_line(self, message: str) -> int | None:
        """The line of an unexpected token: the last of the shortest beginning with that fault."""
        if not message.startswith(_UNEXPECTED):
            return None
        low, high = 0, len(self.tokens) - 1
        while low < high:
            middle = (low + high) // 2
            try:
                cedarpy.PolicySet.from_str(self.text[: self.tokens[middle].end])
                found = False
            except ValueError as error:
                found = str(error) == message
            low, high = (low, middle) if found else (middle + 1, high)
        # The parser looks one token ahead before it speaks.
        return self.tokens[max(low - 1, 0)].line


def _way(words: Sequence[str]) -> tuple[str, ...]:
    """The variable and the attributes, `context.claims`, that `words` end with, if they do."""
    start = len(words) - 1
    while start >= 2 and words[start - 1] == ".":
        start -= 2
    way = tuple(words[start::2])
    return way if way[0] in ("principal", "action", "resource", "context") else ()


def statements(text: str, file: Path) -> Iterator[Statement]:
    """Cuts a file at its semicolons, comments and strings respected.

    What follows the last semicolon is a statement too, unless it is blank.
    """
    tokens: list[Token] = []
    start, line = 0, 1
    for match in _TOKEN.finditer(text):
        if match["blank"] is None:
            tokens.append(Token(match[0], line, match.end() - start))
            if match[0] == ";":
                yield Statement(text[start : match.end()], file, tuple(tokens))
                tokens, start = [], match.end()
        line += match[0].count("\n")
    if tokens:
        yield Statement(text[start:], file, tuple(tokens))
