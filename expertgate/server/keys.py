"""API keys: a YAML file of their hashes, and whose they are.

    - id: alice
      sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
      groups: [research]
      created: 2026-11-24T12:00:00Z     # this and what follows may be missing
      expires: 2027-01-01T00:00:00Z
      revoked: 2026-12-01T00:00:00Z     # no longer valid; the id stays taken
      may_assert: true                  # a gateway's: it names the users that it asks for
      previous: [{sha256: 2c26b46b…, expires: 2026-11-25T12:00:00Z}]  # replaced, and valid so long

A key is `eg-` and 256 random bits, so its plain SHA-256 can't be turned back; it is shown once,
when it is made, and is in no file, log, error or repr of ours.
"""

import hashlib
import hmac
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StrictBool,
    StringConstraints,
)

from expertgate.faults import Place
from expertgate.server.changes import CredentialChange
from expertgate.server.names import Name, key_id
from expertgate.server.times import in_utc
from expertgate.server.watched import WatchedFile
from expertgate.server.yaml_file import YamlError, YamlFile

log = logging.getLogger(__name__)

PREFIX = "eg-"


class KeysError(ValueError):
    """A key file that can't be read or changed: one fault a line, with file, line and place."""


class BadCredential(Exception):  # noqa: N818  (what it is, and named as one)
    """A key that is unknown, revoked or expired; which of them is for the log alone."""


def _time(value: object) -> datetime:
    if isinstance(value, datetime):
        return value
    try:
        if not isinstance(value, str):
            raise ValueError
        time = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("must be an ISO 8601 time, such as 2027-01-01T00:00:00Z") from None
    in_utc(time)
    return time


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Time = Annotated[datetime, BeforeValidator(_time)]
# Nothing at all, as in `expires:`, is refused: one reader's "never" is another's "already".
OptionalTime = Annotated[datetime | None, BeforeValidator(_time)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Replaced(_Entry):
    """The hash of a secret that was replaced, and when it ends."""

    sha256: Sha256
    expires: Time


class Key(_Entry):
    """What is known of one API key."""

    id: Annotated[Name, AfterValidator(key_id)]
    sha256: Sha256
    groups: frozenset[Name] = frozenset()
    created: OptionalTime = None
    expires: OptionalTime = None
    revoked: OptionalTime = None
    may_assert: StrictBool = False
    """A gateway's, which asks for its users; `groups` are then all that they may have."""
    previous: tuple[Replaced, ...] = ()

    def state(self, now: datetime) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "active" if self.expires is None or now < self.expires else "expired"

    def terms(self) -> dict[str, object]:
        """All that is known of it but its secrets, in plain values."""
        return self.model_dump(mode="json", exclude={"id", "sha256", "previous"}) | {
            "groups": sorted(self.groups)
        }

    def secrets(self) -> Iterator[tuple[Place, str, datetime | None]]:
        """Of each of its secrets: the hash's place in the entry, the hash, and when it ends."""
        yield ("sha256",), self.sha256, self.expires
        for index, replaced in enumerate(self.previous):
            ends = min(replaced.expires, self.expires or replaced.expires)
            yield ("previous", index, "sha256"), replaced.sha256, ends


@dataclass(frozen=True, slots=True)
class Secret:
    """One that opens: whose it is, and when it ends."""

    sha256: str = field(repr=False)
    key: Key
    ends: datetime | None


class KeyStore:
    """The keys of a file, read again when it changes; a broken file leaves the old ones in force.

    A key whose entry is gone is revoked, as one that is marked so.
    """

    def __init__(self, path: Path) -> None:
        """Raises KeysError."""
        try:
            self._file = WatchedFile(path, _by_hash)
        except OSError as error:
            raise KeysError(f"{path}: {error.strerror or error}") from None

    @property
    def groups(self) -> frozenset[str]:
        """Of all keys, whatever their state."""
        return frozenset().union(*(secret.key.groups for secret in self._file.value.values()))

    async def refresh(self) -> tuple[CredentialChange, ...]:
        """Looks at the file; the keys that are other ones from now on, by id."""
        before = self._file.value
        if not await self._file.refresh():
            return ()
        return tuple(_changes(_by_id(before), _by_id(self._file.value)))

    def find(self, secret: str) -> Secret:
        """Raises BadCredential, for a wrong key and an expired one alike."""
        known = self._file.value
        try:
            digest = hash_of(secret)
        except UnicodeEncodeError:
            # Half of a surrogate pair; the error would have the secret in it.
            raise BadCredential from None
        # What the look-up's time could tell is about the hash, of which the caller chooses no bit
        # towards a known one: to learn anything of a key is to invert SHA-256. The comparison in
        # constant time costs nothing, and keeps that true of the last step.
        found = known.get(digest)
        if found is None or not hmac.compare_digest(found.sha256, digest):
            log.info("refused a key that is not in %s", self._file.path)
            raise BadCredential
        key, now = found.key, datetime.now(UTC)
        if key.state(now) != "active":
            log.info("refused key %s, which is %s", key.id, key.state(now))
            raise BadCredential
        if found.ends is not None and found.ends <= now:
            log.info("refused key %s: this secret of it was replaced", key.id)
            raise BadCredential
        return found


def hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def parse_keys(raw: bytes, path: Path) -> list[Key]:
    """The keys of a file; an empty one has none. Raises KeysError."""
    try:
        file = YamlFile.parse(raw, path)
        if file.value is None:
            return []
        keys = file.validate(list[Key])
        seen: dict[str, int] = {}
        for index, key in enumerate(keys):
            own = [
                (("id",), f"id {key.id}"),
                *((place, hash_) for place, hash_, _ in key.secrets()),
            ]
            for place, value in own:
                if value in seen:
                    words = f"is that of entry [{seen[value]}] as well"
                    raise file.fault((index, *place), words)
                seen[value] = index
    except YamlError as error:
        raise KeysError(str(error)) from None
    return keys


def _by_hash(raw: bytes, path: Path) -> dict[str, Secret]:
    return {
        sha256: Secret(sha256, key, ends)
        for key in parse_keys(raw, path)
        for _, sha256, ends in key.secrets()
    }


def _by_id(known: Mapping[str, Secret]) -> dict[str, Key]:
    return {secret.key.id: secret.key for secret in known.values()}


def _changes(before: Mapping[str, Key], after: Mapping[str, Key]) -> Iterator[CredentialChange]:
    for user in sorted(before.keys() | after.keys()):
        old, new = before.get(user), after.get(user)
        if old != new:
            yield CredentialChange(
                user,
                None if old is None else old.terms(),
                None if new is None else new.terms(),
                # A set: which of a key's secrets stands first is all the same.
                old is None
                or new is None
                or {hash_ for _, hash_, _ in old.secrets()}
                != {hash_ for _, hash_, _ in new.secrets()},
            )
