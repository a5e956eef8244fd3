"""Appends records to the log; callers that need it can wait until their record is on disk.

A single thread writes. Records that arrive while it waits for the disk form the next batch, so
that many requests share one synchronous write. A record that no caller waits for goes out with
the next one that is waited for, or after `_MOMENT_S`. A failed write leaves no trace: the file is
truncated to what is known to be on disk, and the chain continues from there.
"""

import asyncio
import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from expertgate.server.audit import folder as folders
from expertgate.server.audit.chain import VERSION, AuditError, digest, line_of
from expertgate.server.audit.landing import Landing
from expertgate.server.audit.logfile import LogFile
from expertgate.server.audit.signing import SigningKey

log = logging.getLogger(__name__)

_MAX_WAITING = 4096
"""Requests whose record isn't on disk yet; more are turned away."""
_MAX_KEPT = 16384
"""Records that nobody waits for, kept while the disk fails; more are counted and lost."""
_WRITE_TIMEOUT_S = 5.0
_TOO_SLOW = f"the disk took more than {_WRITE_TIMEOUT_S:.0f} s"
_TICK_S = 1.0
_MOMENT_S = 0.05
"""For so long a record that nobody waits for may wait for others to be written with."""
_SIGN_AFTER_S = 10.0
"""A quiet log is signed up to its end after this time."""


class AuditUnavailable(Exception):  # noqa: N818  (what it is, and named as one)
    """The record is not on disk, and what it speaks of must not happen."""


class AuditLate(AuditUnavailable):
    """The record was not on disk in time. It may be later, and then what becomes of it is."""


@dataclass(frozen=True, slots=True)
class Written:
    """A record's number and line hash. Made only after the record is on disk."""

    seq: int
    hash: str


@dataclass(frozen=True, slots=True)
class Waived:
    """The configuration allows the request to go on without a record on disk."""

    why: str


Recorded = Written | Waived
"""How the log answered for a record: with its place, or with why it may be missing."""


@dataclass(slots=True)
class _Queued:
    """A record on its way to the disk; `place` resolves once it is there.

    `waits`: a caller can't go on until then, and is refused if the write fails. Other records
    stay queued and are tried again.
    """

    fields: dict[str, Any]
    waits: bool
    place: Future[Written] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _State:
    """What is on disk: the last record (`seq`, `hash`), and how many since the last head."""

    seq: int
    hash: str
    unsigned: int


class AuditLog:
    """A log in a folder that no other process writes to."""

    def __init__(
        self,
        folder: Path,
        key: SigningKey,
        *,
        rotate_bytes: int,
        sign_every: int,
        fail_open: bool = False,
    ) -> None:
        """Continues the log, or begins one. Raises AuditError."""
        self.folder = folder
        self.key = key
        self._rotate_bytes = rotate_bytes
        self._sign_every = sign_every
        self.fail_open = fail_open
        self._wake = threading.Condition()  # around a lock that its holder may take again
        self._queue: deque[_Queued] = deque()
        self._urgent = False  # somebody waits for what is in the queue
        self._asleep = False  # the thread, until something comes
        self._closing = False
        self._fault = ""
        self._began: float | None = None
        self._head: bytes | None = None
        self._head_fault = ""
        self._signed_at = time.monotonic()
        self.on_commit: Callable[[float], None] = lambda _: None
        """Told, on the thread, how many seconds the disk took for what was written together."""
        self.lost = 0
        """Records that are gone for good."""
        self._unreported = 0  # of these, how many no `gap` has counted yet
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise AuditError(f"{folder}: another process is writing this log") from None
        except FileExistsError:
            raise AuditError(f"{folder}: is no folder; the log needs one of its own") from None
        except OSError as error:
            raise AuditError(f"{folder}: {error.strerror or error}") from None
        try:
            self._state, self._file = self._continue()
        except AuditError:
            os.close(self._lock)
            raise
        # What another process left, or somebody else has written since. No head may sign over it
        # before a start stands between the two, which says so for good.
        self._left = self._state.unsigned > 0
        self._thread = threading.Thread(target=self._work, name="audit-log", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> str:
        """Why nothing can be written at the moment; empty where it can."""
        began = self._began
        if began is not None and time.monotonic() - began > _WRITE_TIMEOUT_S:
            return _TOO_SLOW
        return self._fault

    @property
    def healthy(self) -> bool:
        return not self.fault

    @property
    def depth(self) -> int:
        """Records that wait to be written."""
        return len(self._queue)

    async def append(self, kind: str, **fields: Any) -> Recorded:
        """Returns once the record is on disk. Raises AuditUnavailable.

        A log that is open on failure says Waived instead, and keeps the record for later. It is
        kept as well where the caller waits no longer.
        """
        queued = _Queued(_stamped(kind, fields), waits=True)
        try:
            if not self.healthy:
                raise AuditUnavailable(self.fault)
            if self.depth >= _MAX_WAITING:
                raise AuditUnavailable("too many records wait to be written")
        except AuditUnavailable as error:
            if not self.fail_open:
                raise
            self._push(replace(queued, waits=False))
            return Waived(str(error))
        self._push(queued)
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                return await Landing(queued.place)
        except TimeoutError:
            # The record still waits, or is being written.
            refused: AuditUnavailable = AuditLate(_TOO_SLOW)
        except AuditUnavailable as error:
            refused = error
        if self.fail_open:
            return Waived(str(refused))
        raise refused from None

    def note(self, kind: str, **fields: Any) -> Future[Written]:
        """Queues a record that nothing need wait for; it is kept while the disk fails."""
        queued = _Queued(_stamped(kind, fields), waits=False)
        self._push(queued)
        return queued.place

    def record(self, kind: str, **fields: Any) -> None:
        """As `append`, for a thread that may wait. Raises AuditUnavailable."""
        queued = _Queued(_stamped(kind, fields), waits=True)
        self._push(queued)
        try:
            queued.place.result(_WRITE_TIMEOUT_S)
        except TimeoutError:
            raise AuditUnavailable(_TOO_SLOW) from None

    def hurry(self) -> None:
        """Somebody waits for what is in the queue."""
        with self._wake:
            self._urgent = True
            self._wake.notify()

    def close(self) -> None:
        """Writes and signs what is left. Waits for the disk."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        if self._queue:
            words = "%s: %d records could not be written, and are lost: %s"
            log.critical(words, self.folder, len(self._queue), self._fault)
        self._file.close()
        os.close(self._lock)

    # --- the queue ----------------------------------------------------------------------------

    def _push(self, queued: _Queued) -> None:
        with self._wake:
            if len(self._queue) >= _MAX_KEPT:
                self._lose(queued, "more records than can be kept wait for the disk")
                return
            self._queue.append(queued)
            self._urgent = self._urgent or queued.waits
            if self._urgent or self._asleep:
                self._wake.notify()

    def _lose(self, queued: _Queued, why: str) -> None:
        with self._wake:
            self.lost += 1
            self._unreported += 1
        _reject(queued, why)

    # --- before the thread --------------------------------------------------------------------

    def _continue(self) -> tuple[_State, LogFile]:
        """Where the log goes on; what a crash tore is set aside, and a record says so."""
        end = folders.find_end(self.folder, self.key.public)
        if end.torn:
            try:
                aside = folders.set_aside(end)
            except OSError as error:
                raise AuditError(f"{end.path}: {error.strerror or error}") from None
            log.warning(
                "%s: a crash tore what followed record %d; it is kept as %s",
                end.path,
                end.seq,
                aside.name,
            )
            self.note(
                "recovered",
                after=end.seq,
                torn_bytes=len(end.torn),
                torn_sha256=digest(end.torn),
                kept_as=aside.name,
            )
        state = _State(end.seq, end.hash, end.unsigned)
        return state, LogFile(self.folder, end.path, end.size)

    # --- on the thread ------------------------------------------------------------------------

    def _work(self) -> None:
        closing = False
        while not closing:
            with self._wake:
                self._rest()
                taken, self._queue, self._urgent = list(self._queue), deque(), False
                closing = self._closing
            quiet = time.monotonic() - self._signed_at >= _SIGN_AFTER_S
            self._commit(taken, sign=closing or quiet)
            if not self.healthy:
                # Nothing new comes meanwhile but what is kept, so there is no need to hurry.
                with self._wake:
                    self._wake.wait_for(lambda: self._closing, _TICK_S)

    def _rest(self) -> None:
        """Until there is something to write, or a tick has passed. Holds the lock."""

        def pressed() -> bool:
            return self._urgent or self._closing

        if self._wake.wait_for(pressed, _MOMENT_S) or self._queue:
            return
        self._asleep = True
        self._wake.wait(_TICK_S)
        self._asleep = False
        if self._queue:
            self._wake.wait_for(pressed, _MOMENT_S)

    def _commit(self, taken: list[_Queued], *, sign: bool) -> None:
        """Writes what was taken from the queue and, where it is time, a head; or nothing of it."""
        unreported = self._unreported
        if unreported or self._fault:
            # Also what shows, without a request, whether the disk is back.
            gap = _stamped("gap", {"lost": unreported, "why": self._fault})
            taken.insert(0, _Queued(gap, waits=False))
        batch = _Batch(self._state, self.key, self._sign_every, left=self._left)
        written: list[tuple[_Queued, Written]] = []
        try:
            for queued in list(taken):
                try:
                    written.append((queued, batch.add(queued.fields)))
                except ValueError as error:
                    log.error("a record has no canonical form and is lost: %s", error)
                    self._lose(queued, "the record has no canonical form")
                    taken.remove(queued)
            rotate = self._file.size + batch.size >= self._rotate_bytes
            if batch.state.unsigned and not batch.left and (sign or rotate):
                batch.add_head()
            if not batch.lines:
                return
            began = self._began = time.monotonic()
            if self._head is not None and not (self.folder / folders.HEAD_FILE).exists():
                # No server would go on with a log that has more than a start, and no such file.
                folders.replace_head(self.folder, self._head)
            self._file.write(b"".join(batch.lines), self._state.seq + 1, self._state.hash)
        except Exception as error:  # whatever it is, nothing may be taken for written
            self._failed(error, taken)
            return
        finally:
            self._began = None
        self._state = batch.state
        self.on_commit(time.monotonic() - began)
        self._left = batch.left
        with self._wake:
            self._unreported -= unreported
        if self._fault:
            log.warning("the audit log is written again: %s", self.folder)
            self._fault = ""
        for queued, place in written:
            if queued.place.set_running_or_notify_cancel():
                queued.place.set_result(place)
        if rotate:
            self._file.finish()
        if batch.head is not None:
            self._head = batch.head
            self._signed_at = time.monotonic()
        if self._head is not None:
            self._copy_head(self._head)

    def _copy_head(self, head: bytes) -> None:
        """Nobody waits for this; where it fails, it is tried again after the next commit."""
        self._began = time.monotonic()  # for all wait behind it
        try:
            folders.replace_head(self.folder, head)
        except Exception as error:  # also of a kind that nobody thought of: others wait for us
            words = _words(error)
            if words != self._head_fault:
                file = self.folder / folders.HEAD_FILE
                log.error("%s: can't be written: %s; a cut of the log might not show", file, words)
            self._head_fault = words
            return
        finally:
            self._began = None
        self._head, self._head_fault = None, ""

    def _failed(self, error: Exception, taken: list[_Queued]) -> None:
        self._file.close()
        words = _words(error)
        if words != self._fault or self.fail_open:
            log.critical(
                "the audit log can't be written: %s: %s; %s",
                self.folder,
                words,
                "requests run WITHOUT A RECORD" if self.fail_open else "requests are refused",
            )
        self._fault = words
        kept = []
        for queued in taken:
            if queued.fields["kind"] == "gap":
                continue  # made anew at the next try
            if not queued.waits:
                kept.append(queued)
                continue
            told = _reject(queued, self._fault)
            if self.fail_open or not told:
                kept.append(_Queued(queued.fields, waits=False))
        with self._wake:
            self._queue.extendleft(reversed(kept))


class _Batch:
    """Lines in the making, and the state once they are on disk."""

    def __init__(self, state: _State, key: SigningKey, sign_every: int, *, left: bool) -> None:
        """`left`: there are records before, from which a start has to part what is signed."""
        self.state = state
        self.left = left
        self.lines: list[bytes] = []
        self.size = 0
        self.head: bytes | None = None
        self._key = key
        self._sign_every = sign_every

    def add(self, fields: dict[str, Any]) -> Written:
        """Raises ValueError for what has no canonical form."""
        place = self._add({**fields, **self._place()}, self.state.unsigned + 1)
        started = fields["kind"] == "start"
        self.left = self.left and not started
        # At the start, so that a head says how often this process signs.
        if started or (self.state.unsigned >= self._sign_every and not self.left):
            self.add_head()
        return place

    def add_head(self) -> None:
        head = _stamped("head", {"key": self._key.id, "every": self._sign_every})
        self._add(self._key.sign_head({**head, **self._place()}), 0)
        self.head = self.lines[-1]

    def _place(self) -> dict[str, Any]:
        return {"seq": self.state.seq + 1, "prev": self.state.hash}

    def _add(self, record: dict[str, Any], unsigned: int) -> Written:
        line = line_of(record)
        self.lines.append(line + b"\n")
        self.size += len(line) + 1
        self.state = replace(
            self.state, seq=self.state.seq + 1, hash=digest(line), unsigned=unsigned
        )
        return Written(self.state.seq, self.state.hash)


def _words(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) else None
    return said or str(error) or type(error).__name__


def _stamped(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return {**fields, "v": VERSION, "kind": kind, "time": now}


def _reject(queued: _Queued, why: str) -> bool:
    """Whether anybody was there to be told."""
    waits = queued.place.set_running_or_notify_cancel()
    if waits:
        queued.place.set_exception(AuditUnavailable(why))
    return waits
