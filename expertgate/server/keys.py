"""API keys: a YAML file of their hashes, and whose they are.

    - id: alice
      sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
      groups: [research]
      expires: 2027-01-01T00:00:00Z     # may be missing

A key is `eg-` and 256 random bits, so its plain SHA-256 can't be turned back; it is shown once,
when it is made, and is in no file, log, error or repr of ours.
"""

import base64
import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import textwrap
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StringConstraints,
    ValidationError,
)

from expertgate.policies.principal import Principal
from expertgate.server.yaml_file import YamlError, YamlFile

log = logging.getLogger(__name__)

PREFIX = "eg-"
_SECRET_BYTES = 32
_LOOK_EVERY_S = 0.2


class KeysError(ValueError):
    """A key file that can't be read or added to: one fault a line, with file, line and place."""


class BadCredential(Exception):  # noqa: N818  (what it is, and named as one)
    """A key that is unknown, revoked or expired; which of them is for the log alone."""


def _printable(text: str) -> str:
    # Ids and groups end up in logs, one line each.
    if not text.isprintable():
        raise ValueError("must be printable text")
    return text


def _time(value: object) -> datetime | None:
    if value is None:
        return None
    try:
        if not isinstance(value, str):
            raise ValueError
        time = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("must be an ISO 8601 time, such as 2027-01-01T00:00:00Z") from None
    if time.tzinfo is None:
        raise ValueError(f"has no time zone; write {time.isoformat()}Z if UTC is meant")
    return time


Name = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_printable)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Key(BaseModel):
    """What is known of one API key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Name
    sha256: Sha256
    groups: frozenset[Name] = frozenset()
    expires: Annotated[datetime | None, BeforeValidator(_time)] = None


def create_key(path: Path, id: str, groups: Iterable[str], expires: datetime | None) -> str:  # noqa: A002
    """Adds a key to the file, made if it is missing, and gives the secret, which is kept nowhere.

    Other entries and comments stay as they are; at every moment the file is the old or the new
    one, and of two creators neither loses a key. Raises KeysError where the file can't be read or
    written, the id is taken, or an argument doesn't fit.
    """
    secret = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(_SECRET_BYTES)).decode().rstrip(
        "="
    )
    entry: dict[str, object] = {"id": id, "sha256": _hash(secret), "groups": sorted(set(groups))}
    if expires is not None:
        entry["expires"] = expires.isoformat()
    try:
        Key.model_validate(entry)
    except ValidationError as error:
        fault = error.errors(include_input=False)[0]
        raise KeysError(
            f"{fault['loc'][0]}: {fault['msg'].removeprefix('Value error, ')}"
        ) from None
    try:
        target = path.resolve()
        # The file is replaced by a new one, so it is its folder that is locked.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            old = target.read_bytes() if target.exists() else b""
            known = _parse(old, path)
            if id in (key.id for key in known):
                raise KeysError(f"{path}: there is a key {id!r}; choose another id, or remove it")
            new = _appended(old, entry, path)
            if len(_parse(new, path)) != len(known) + 1:
                raise KeysError(f"{path}: nothing can be added at its end; is it one plain list?")
            _replace(target, new)
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror or error}") from None
    return secret


class KeyStore:
    """The keys of a file, read again when it changes; a broken file leaves the old ones in force.

    A key whose entry is gone is revoked, within a fifth of a second.
    """

    def __init__(self, path: Path) -> None:
        """Raises KeysError."""
        self._path = path
        self._looked = time.monotonic()
        self._stamp = _stamp(path)
        self._fault = ""
        self._changes = 0
        self._keys = _by_hash(_read(path), path)

    def principal_for(self, secret: str) -> Principal:
        """Raises BadCredential, for a wrong key and an expired one alike."""
        self._refresh()
        try:
            digest = _hash(secret)
        except UnicodeEncodeError:
            # Half of a surrogate pair; the error would have the secret in it.
            raise BadCredential from None
        # What the look-up's time could tell is about the hash, of which the caller chooses no bit
        # towards a known one: to learn anything of a key is to invert SHA-256. The comparison in
        # constant time costs nothing, and keeps that true of the last step.
        key = self._keys.get(digest)
        if key is None or not hmac.compare_digest(key.sha256, digest):
            log.info("refused a key that is not in %s", self._path)
            raise BadCredential
        if key.expires is not None and key.expires <= datetime.now(UTC):
            log.info("refused key %s, which expired at %s", key.id, key.expires.isoformat())
            raise BadCredential
        return Principal(key.id, key.groups, via="key")

    def _refresh(self) -> None:
        if time.monotonic() - self._looked >= _LOOK_EVERY_S:
            self.refresh()

    def refresh(self) -> int:
        """Looks at the file now; how often other keys have come into force since the start."""
        self._looked = time.monotonic()
        # Before it is read: what is written meanwhile changes the stamp once more.
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            self._fault = ""
            return self._changes
        try:
            raw = _read(self._path)
        except KeysError as error:
            # The stamp stays the old one: what can't be read now is tried at the next look.
            self._failed(error)
            return self._changes
        self._stamp = stamp
        try:
            self._keys = _by_hash(raw, self._path)
        except KeysError as error:
            self._failed(error)
            return self._changes
        self._fault = ""
        self._changes += 1
        log.info("%s: %d keys are in force", self._path, len(self._keys))
        return self._changes

    def _failed(self, error: KeysError) -> None:
        """Says it once for each change of the fault, not at every look."""
        fault = str(error).replace("\n", "; ")
        if fault != self._fault:
            log.error("the keys read before stay in force: %s", fault)
        self._fault = fault


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror or error}") from None


def _by_hash(raw: bytes, path: Path) -> dict[str, Key]:
    return {key.sha256: key for key in _parse(raw, path)}


def _parse(raw: bytes, path: Path) -> list[Key]:
    """The keys of a file; an empty one has none. Raises KeysError."""
    try:
        file = YamlFile.parse(raw, path)
        if file.value is None:
            return []
        keys = file.validate(list[Key])
        for field in ("id", "sha256"):
            first: dict[str, int] = {}
            for index, key in enumerate(keys):
                value = getattr(key, field)
                if value in first:
                    raise file.fault((index, field), f"is that of entry [{first[value]}] as well")
                first[value] = index
    except YamlError as error:
        raise KeysError(str(error)) from None
    return keys


def _appended(old: bytes, entry: dict[str, object], path: Path) -> bytes:
    """The text of the file with one more item, indented as its list is."""
    node = yaml.compose(old, Loader=yaml.CSafeLoader)
    if isinstance(node, yaml.SequenceNode) and node.flow_style:
        raise KeysError(f"{path}: is a list in [brackets]; write its entries one by one, with '- '")
    item = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)
    indent = " " * node.start_mark.column if node is not None and node.start_mark else ""
    separator = b"" if not old or old.endswith(b"\n") else b"\n"
    return old + separator + textwrap.indent(item, indent).encode()


def _replace(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    # The time of a change as well: of its mode, or by someone who set the other time back.
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
