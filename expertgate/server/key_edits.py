"""Changes to a key file: keys made, replaced, ended and revoked.

What an edit isn't about stays as it is, comments included. At every moment the file is the old or
the new one, and of two who edit it neither undoes the other. All raise KeysError where the file
can't be read or written, or an argument doesn't fit what is in it.
"""

import base64
import secrets
import textwrap
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from pydantic import ValidationError

from expertgate.server.file_edit import locked, replace
from expertgate.server.keys import PREFIX, Key, KeysError, Replaced, hash_of, parse_keys

_MARK = "\ufeff"
"""With which some editors begin a file."""
_SECRET_BYTES = 32


def create_key(
    path: Path,
    id: str,  # noqa: A002
    groups: Iterable[str],
    expires: datetime | None,
    *,
    may_assert: bool = False,
) -> str:
    """Adds a key to the file, made if it is missing, and gives the secret, kept nowhere."""
    secret = _new_secret()
    entry: dict[str, object] = {"id": id, "sha256": hash_of(secret), "groups": sorted(set(groups))}
    entry["created"] = _text(_now())
    if expires is not None:
        entry["expires"] = _text(expires)
    if may_assert:
        entry["may_assert"] = True
    try:
        key = Key.model_validate(entry)
    except ValidationError as error:
        fault = error.errors(include_input=False)[0]
        raise KeysError(
            f"{fault['loc'][0]}: {fault['msg'].removeprefix('Value error, ')}"
        ) from None

    def change(old: str, known: list[Key]) -> tuple[str, list[Key]]:
        if id in (key.id for key in known):
            raise KeysError(f"{path}: there is a key {id!r}; choose another id, or rotate it")
        return _appended(old, entry, path), [*known, key]

    _edit(path, change)
    return secret


def rotate_key(
    path: Path,
    id: str,  # noqa: A002
    grace: timedelta,
    expires: datetime | None,
) -> str:
    """Gives the key a new secret. The old one goes on for `grace`, but not beyond its own end.

    Without any grace, those that were replaced before end as well.
    `expires` is the new secret's end; None keeps the one that the key has.
    """
    secret = _new_secret()

    def replaced(key: Key) -> dict[str, object]:
        now = _now()
        if expires is None and key.state(now) == "expired":
            raise KeysError(f"{path}: key {id!r} is expired; say when the new secret expires")
        # A secret that is replaced twice doesn't come back: each keeps the end that it was given,
        # or that of the key, which may have another one now.
        end = key.expires or datetime.max.replace(tzinfo=UTC)
        ends = min(now + grace, end)
        old = [
            *(Replaced(sha256=e.sha256, expires=min(e.expires, end)) for e in key.previous),
            Replaced(sha256=key.sha256, expires=ends),
        ]
        fields: dict[str, object] = {
            "sha256": hash_of(secret),
            "created": _text(now),
        }
        if key.previous or ends > now:
            fields["previous"] = [
                {"sha256": each.sha256, "expires": _text(each.expires)}
                for each in old
                if grace and each.expires > now
            ]
        if expires is not None:
            fields["expires"] = _text(expires)
        return fields

    _change_key(path, id, replaced)
    return secret


def expire_key(path: Path, id: str, expires: datetime) -> None:  # noqa: A002
    """Sets when the key ends, with all its secrets."""
    _change_key(path, id, lambda _: {"expires": _text(expires)})


def revoke_key(path: Path, id: str) -> None:  # noqa: A002
    """Ends the key now, with all its secrets. Its id stays taken, for whoever reads old logs."""
    _change_key(path, id, lambda _: {"revoked": _text(_now())})


def _change_key(
    path: Path,
    id: str,  # noqa: A002
    fields_of: Callable[[Key], dict[str, object]],
) -> None:
    def change(text: str, known: list[Key]) -> tuple[str, list[Key]]:
        for index, key in enumerate(known):
            if key.id != id:
                continue
            if key.revoked is not None:
                raise KeysError(f"{path}: key {id!r} was revoked at {_text(key.revoked)}")
            fields = fields_of(key)
            for name, value in fields.items():
                text = _with_field(text, index, name, value)
            new = Key.model_validate({**key.model_dump(exclude_none=True), **fields})
            return text, [*known[:index], new, *known[index + 1 :]]
        raise KeysError(f"{path}: there is no key {id!r}")

    _edit(path, change)


def _edit(path: Path, change: Callable[[str, list[Key]], tuple[str, list[Key]]]) -> None:
    """Replaces the file by what `change` makes of its text and keys: the text, and what it says."""
    try:
        with locked(path) as target:
            old = target.read_bytes() if target.exists() else b""
            known = parse_keys(old, path)
            text = old.decode()
            rest = text.removeprefix(_MARK)  # of which the parser counts no character
            changed, expected = change(rest, known)
            new = (text[: len(text) - len(rest)] + changed).encode()
            if parse_keys(new, path) != expected:
                words = "can't be changed here, as it is written; is it one plain list of entries?"
                raise KeysError(f"{path}: {words}")
            replace(target, new)
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror or error}") from None


def _appended(old: str, entry: dict[str, object], path: Path) -> str:
    """The text of the file with one more item, indented as its list is."""
    node = yaml.compose(old, Loader=yaml.CSafeLoader)
    if isinstance(node, yaml.SequenceNode) and node.flow_style:
        raise KeysError(f"{path}: is a list in [brackets]; write its entries one by one, with '- '")
    item = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)
    indent = " " * node.start_mark.column if node is not None and node.start_mark else ""
    separator = "" if not old or old.endswith("\n") else "\n"
    return old + separator + textwrap.indent(item, indent)


def _with_field(text: str, index: int, name: str, value: object) -> str:
    """The text of the file with a field of one entry set: in its place, or after the hash."""
    # In one line, whatever its length.
    written = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=1 << 20)
    written = written.strip()[1:-1]
    root = yaml.compose(text, Loader=yaml.CSafeLoader)
    assert isinstance(root, yaml.SequenceNode)  # it has been parsed as one
    entry = root.value[index]
    fields = {key.value: (key, node) for key, node in entry.value}
    if name in fields:
        _, node = fields[name]
        if isinstance(node, yaml.CollectionNode) and not node.flow_style:
            written = f"  {written}"  # what began in a line of its own must be further in
        return text[: node.start_mark.index] + written + text[_end(node) :]
    key, node = fields["sha256"]
    end = _end(node)
    if entry.flow_style:
        return f"{text[:end]}, {name}: {written}{text[end:]}"
    line_end = text.find("\n", end)
    line_end = len(text) if line_end < 0 else line_end
    indent = " " * key.start_mark.column
    return f"{text[:line_end]}\n{indent}{name}: {written}{text[line_end:]}"


def _end(node: yaml.Node) -> int:
    """Where a value ends: a list in lines of its own would take the comments behind it along."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _new_secret() -> str:
    return PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(_SECRET_BYTES)).decode().rstrip(
        "="
    )


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _text(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")
