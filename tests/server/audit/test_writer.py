"""The writer: order, shared writes, crashes and disks that fail."""

import asyncio
import errno
import fcntl
import json
import os
import shutil
import threading
import time

import pytest
from prometheus_client import REGISTRY

from expertgate.server import metrics
from expertgate.server.audit import folder as folders
from expertgate.server.audit import logfile, writer
from expertgate.server.audit.chain import AuditError, digest, line_of
from expertgate.server.audit.folder import HEAD_FILE
from expertgate.server.audit.lately import lately
from expertgate.server.audit.signing import PublicKeys
from expertgate.server.audit.verify import verify
from expertgate.server.audit.writer import AuditUnavailable, Waived, Written
from tests.server.audit.logs import (
    check,
    open_log,
    public_keys,
    records,
    signing_key,
    write_log,
)
from tests.support.waiting import until


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(writer, "_TICK_S", 0.02)


class Disk:
    """os.write of the writer's thread, failing when told to, and counted.

    After a `sync_error` all may stand in the file, and is not known to be on disk.
    """

    def __init__(self, monkeypatch):
        self.write_error = self.sync_error = self.room = None
        self.writes = 0
        self.hold = threading.Event()
        self.hold.set()
        self._write = os.write
        monkeypatch.setattr(writer.os, "write", self.write)

    def write(self, file, data):
        if threading.current_thread().name != "audit-log":
            return self._write(file, data)
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DSYNC  # on disk when it returns
        self.hold.wait()
        self.writes += 1
        if self.write_error:
            raise OSError(self.write_error, os.strerror(self.write_error))
        if self.room is not None:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[: self.room]
            self.room -= len(data)
        written = self._write(file, data)
        if self.sync_error:
            raise OSError(self.sync_error, os.strerror(self.sync_error))
        return written


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def kinds(folder):
    return [record["kind"] for record in records(folder)]


def test_a_record_is_where_the_log_says(tmp_path):
    log = open_log(tmp_path)

    async def write():
        return [await log.append("request", n=n) for n in range(3)]

    places = asyncio.run(write())
    assert [place.seq for place in places] == [1, 2, 3]
    found = records(tmp_path)
    assert [r["prev"] for r in found[1:]] == [place.hash for place in places[:2]]
    log.close()


def test_nothing_is_told_before_it_is_on_disk(tmp_path, disk):
    log = open_log(tmp_path)
    disk.hold.clear()

    async def write():
        asking = asyncio.create_task(log.append("request"))
        await asyncio.sleep(0.1)
        assert not asking.done()
        disk.hold.set()
        return await asking

    assert isinstance(asyncio.run(write()), Written)
    log.close()


def test_what_nobody_waits_for_is_written_with_the_next_that_somebody_does(
    tmp_path, disk, monkeypatch
):
    monkeypatch.setattr(writer, "_MOMENT_S", 1000)
    log = open_log(tmp_path)
    log.record("request", n=1)
    before = disk.writes
    result = log.note("result", n=1)
    time.sleep(0.1)
    assert not result.done()
    log.record("request", n=2)
    assert result.result(20).seq == 2
    assert disk.writes == before + 1
    log.close()


def test_what_nobody_waits_for_is_written_after_a_moment_or_when_somebody_asks(
    tmp_path, monkeypatch
):
    log = open_log(tmp_path)
    assert log.note("result").result(20).seq == 1
    monkeypatch.setattr(writer, "_MOMENT_S", 1000)
    log.record("request")
    result = log.note("result")
    log.hurry()
    assert result.result(20).seq == 3
    log.close()


def test_metrics_show_what_waits_and_how_long_the_disk_took(tmp_path, disk):
    def sample(name):
        return REGISTRY.get_sample_value(f"expertgate_audit_{name}")

    log = open_log(tmp_path)
    metrics.watch_audit(log)
    log.record("request")
    before = sample("write_seconds_count"), sample("write_seconds_sum")
    disk.hold.clear()
    log.note("result")
    until(lambda: not log.depth)  # on its way, and held up
    for n in range(3):
        log.note("result", n=n)
    assert sample("records_waiting") == 3
    time.sleep(0.1)
    disk.hold.set()
    until(lambda: sample("records_waiting") == 0)
    log.close()
    assert sample("write_seconds_count") >= before[0] + 2
    assert sample("write_seconds_sum") >= before[1] + 0.1


def test_many_share_one_write(tmp_path, disk):
    log = open_log(tmp_path, sign_every=10_000)

    async def write():
        await log.append("request")
        disk.hold.clear()
        before = disk.writes
        asking = [asyncio.create_task(log.append("request")) for _ in range(200)]
        await asyncio.sleep(0.1)
        disk.hold.set()
        await asyncio.gather(*asking)
        return disk.writes - before

    # Those that came while the first of them was being written went together.
    assert asyncio.run(write()) <= 3
    log.close()
    assert check(tmp_path).faults == []


def test_a_log_goes_on_where_it_ended(tmp_path):
    write_log(tmp_path, 3)
    write_log(tmp_path, 3)
    assert check(tmp_path).faults == []
    assert [r["seq"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "audit").write_text("")
    with pytest.raises(AuditError, match="audit: is no folder; the log needs one of its own"):
        open_log(tmp_path)


def test_two_writers_are_one_too_many(tmp_path):
    log = open_log(tmp_path)
    with pytest.raises(AuditError, match="another process is writing"):
        open_log(tmp_path)
    log.close()
    open_log(tmp_path).close()


def test_a_quiet_log_gets_signed(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_SIGN_AFTER_S", 0.05)
    log = open_log(tmp_path)
    log.record("request")
    until(lambda: kinds(tmp_path) == ["request", "head"])
    time.sleep(0.2)
    assert kinds(tmp_path) == ["request", "head"]
    log.close()


# --- a crash ------------------------------------------------------------------------------------


def last_file(folder):
    return max((folder / "audit").glob("*.jsonl"))


@pytest.mark.parametrize("torn", [b"{", b'{"kind":"request"}\n', b"\0" * 300, b"\n", b"x\n{"])
def test_torn_bytes_are_set_aside_and_told(tmp_path, torn):
    write_log(tmp_path, 3)
    with last_file(tmp_path).open("ab") as file:
        file.write(torn)
    assert check(tmp_path).faults
    write_log(tmp_path, 1)
    report = check(tmp_path)
    assert report.faults == []
    (recovered,) = (r for r in records(tmp_path) if r["kind"] == "recovered")
    assert (recovered["after"], recovered["torn_bytes"]) == (4, len(torn))
    assert (tmp_path / "audit" / recovered["kept_as"]).read_bytes() == torn
    assert any("a crash tore" in note for note in report.notes)


@pytest.mark.parametrize("torn", [b"", b"{"])
def test_a_file_begun_in_the_moment_of_the_crash(tmp_path, torn):
    write_log(tmp_path, 3)
    (tmp_path / "audit" / f"{5:016}.jsonl").write_bytes(torn)
    write_log(tmp_path, 1)
    assert check(tmp_path).faults == []


def test_any_cut_of_the_unsigned_tail_can_be_gone_on_from(tmp_path):
    log = open_log(tmp_path)
    for _ in range(8):
        log.record("request")
    raw = last_file(tmp_path).read_bytes()
    log.close()
    head = [n for n, line in enumerate(raw.splitlines()) if b'"kind":"head"' in line][-1]
    signed = len(b"".join(raw.splitlines(keepends=True)[: head + 1]))
    (tmp_path / "audit" / HEAD_FILE).write_bytes(raw.splitlines()[head])
    for size in range(signed, len(raw), 37):
        last_file(tmp_path).write_bytes(raw[:size])
        write_log(tmp_path, 1)
        assert check(tmp_path).faults == []
        (tmp_path / "audit" / HEAD_FILE).write_bytes(raw.splitlines()[head])


@pytest.fixture
def left(tmp_path):
    """Four records that nobody has signed, one less than are signed together, and torn bytes."""
    log = open_log(tmp_path)
    log.record("start")
    raw = last_file(tmp_path).read_bytes()
    log.close()
    (tmp_path / "audit" / HEAD_FILE).write_bytes(raw.splitlines()[1])
    prev = digest(raw.splitlines()[1])
    for seq in range(3, 7):
        record = {"kind": "request", "prev": prev, "seq": seq, "time": "2026-11-01", "v": 1}
        raw += line_of(record) + b"\n"
        prev = digest(line_of(record))
    last_file(tmp_path).write_bytes(raw + b"{")
    return tmp_path


def test_what_a_crash_left_is_not_signed_before_a_start_says_so(left, monkeypatch):
    """Anybody who could write there could have written it."""
    monkeypatch.setattr(writer, "_SIGN_AFTER_S", 0.0)
    log = open_log(left)
    until(lambda: kinds(left)[-1] == "recovered")
    time.sleep(0.2)
    assert kinds(left) == ["start", "head", *["request"] * 4, "recovered"]
    log.record("start")
    log.close()
    assert kinds(left)[6:9] == ["recovered", "start", "head"]
    report = check(left)
    assert report.faults == []
    assert any("4 records before this start were not signed" in note for note in report.notes)
    vouched = [record["kind"] for record, _ in lately(left / "audit", public_keys(left))]
    assert "request" not in vouched


@pytest.mark.parametrize("rotate_bytes", [1000, 1 << 20])
def test_nor_by_a_server_that_ends_before_it_starts(left, rotate_bytes):
    for _ in range(2):
        log = open_log(left, rotate_bytes=rotate_bytes)
        log.note("stop")
        log.close()
    log = open_log(left)
    log.record("start")
    log.close()
    assert kinds(left).index("head", 2) > kinds(left).index("start", 2)
    vouched = [record["kind"] for record, _ in lately(left / "audit", public_keys(left))]
    assert "request" not in vouched


def test_a_log_cut_behind_a_signed_head_is_not_gone_on_from(tmp_path):
    write_log(tmp_path, 8)
    path = last_file(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:7]))
    with pytest.raises(AuditError, match="ends at record 7, but"):
        open_log(tmp_path)


def test_a_log_damaged_in_its_middle_is_not_gone_on_from(tmp_path):
    write_log(tmp_path, 8)
    path = last_file(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"r2"', b'"rX"'))
    with pytest.raises(AuditError, match="cut or damaged"):
        open_log(tmp_path)


def test_a_missing_last_file_is_not_gone_on_from(tmp_path):
    write_log(tmp_path, 40, rotate_bytes=2000)
    last_file(tmp_path).unlink()
    with pytest.raises(AuditError, match="cut or damaged"):
        open_log(tmp_path)


def test_a_signed_log_without_its_head_file_is_not_gone_on_from(tmp_path):
    write_log(tmp_path, 3)
    (tmp_path / "audit" / HEAD_FILE).unlink()
    with pytest.raises(AuditError, match=r"head\.json: is missing.* Move this folder away"):
        open_log(tmp_path)
    (tmp_path / "audit").rename(tmp_path / "kept")
    write_log(tmp_path, 1)
    assert check(tmp_path).faults == []


def test_a_first_start_that_died_before_it_could_copy_its_head_is_gone_on_from(tmp_path):
    log = open_log(tmp_path)
    log.record("start")
    log.close()
    (tmp_path / "audit" / HEAD_FILE).unlink()
    write_log(tmp_path, 1)
    assert check(tmp_path).faults == []


def test_a_head_that_this_server_did_not_sign_is_not_gone_on_from(tmp_path):
    write_log(tmp_path, 3)
    path = tmp_path / "audit" / HEAD_FILE
    head = json.loads(path.read_text())
    path.write_text(json.dumps({**head, "time": head["time"].replace("T", "t")}))
    with pytest.raises(AuditError, match="signature doesn't hold"):
        open_log(tmp_path)


def test_a_log_written_anew_under_its_head_is_not_gone_on_from(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    signing_key(tmp_path)
    (other / "key.pem").write_bytes((tmp_path / "key.pem").read_bytes())
    for folder in (tmp_path, other):
        write_log(folder, 3)
    (tmp_path / "audit" / HEAD_FILE).write_bytes((other / "audit" / HEAD_FILE).read_bytes())
    with pytest.raises(AuditError, match="has another record 4 than the signed one"):
        open_log(tmp_path)


def test_a_log_goes_on_under_another_key(tmp_path):
    write_log(tmp_path, 3)
    before = signing_key(tmp_path)
    (tmp_path / "key.pem").rename(tmp_path / "old.pem")
    write_log(tmp_path, 3)
    keys = (before, signing_key(tmp_path))
    both = PublicKeys({key.id: key.private.public_key() for key in keys})
    assert verify(tmp_path / "audit", both).faults == []


# --- a disk that fails --------------------------------------------------------------------------


def fails(log):
    with pytest.raises(AuditUnavailable) as caught:
        asyncio.run(log.append("request"))
    return str(caught.value)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("what", ["write_error", "sync_error"])
def test_a_failing_disk_refuses_and_a_mended_one_goes_on(tmp_path, disk, error, what):
    log = open_log(tmp_path)
    log.record("request", n=1)
    setattr(disk, what, error)
    assert os.strerror(error) in fails(log)
    assert not log.healthy
    assert os.strerror(error) in fails(log)  # at once, as long as it is so
    log.note("result", n=2)
    setattr(disk, what, None)
    until(lambda: log.healthy)
    asyncio.run(log.append("request", n=3))
    log.close()
    found = [r for r in records(tmp_path) if r["kind"] in ("request", "result")]
    assert [r["n"] for r in found] == [1, 2, 3]  # what was refused is not there
    assert check(tmp_path).faults == []
    assert log.lost == 0


def test_a_new_file_whose_name_is_not_on_disk_holds_no_record(tmp_path, monkeypatch):
    log = open_log(tmp_path, rotate_bytes=1)  # a file for each
    log.record("request", n=1)

    def failing(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(logfile, "sync_folder", failing)
        assert os.strerror(errno.EIO) in fails(log)
    until(lambda: log.healthy)
    log.record("request", n=2)
    log.close()
    assert [r["n"] for r in records(tmp_path) if r["kind"] == "request"] == [1, 2]
    assert check(tmp_path).faults == []


@pytest.mark.parametrize("what", ["line_of", "replace_head"])
def test_whoever_writes_outlives_a_failure_that_nobody_thought_of(tmp_path, monkeypatch, what):
    """Else all wait for nothing from then on, and the server calls itself ready."""
    log = open_log(tmp_path, sign_every=1)
    owner = folders if what == "replace_head" else writer
    real, errors = getattr(owner, what), [MemoryError()]

    def failing(*arguments):
        if errors:
            raise errors.pop()
        return real(*arguments)

    monkeypatch.setattr(owner, what, failing)
    log.note("result", n=1)
    until(lambda: not errors)
    until(lambda: log.healthy)
    asyncio.run(log.append("request", n=2))
    log.close()
    assert [r["n"] for r in records(tmp_path) if "n" in r] == [1, 2]
    assert check(tmp_path).faults == []


def test_a_disk_that_fills_within_a_line_leaves_no_half_of_it(tmp_path, disk):
    log = open_log(tmp_path)
    log.record("request", n=1)
    disk.room = 100
    fails(log)
    disk.room = None
    until(lambda: log.healthy)
    log.close()
    assert "gap" in kinds(tmp_path)
    assert check(tmp_path).faults == []


def test_what_is_kept_is_bounded_and_the_loss_is_told(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(writer, "_MAX_KEPT", 5)
    log = open_log(tmp_path)
    log.record("request")
    disk.write_error = errno.ENOSPC
    fails(log)
    for n in range(9):
        log.note("result", n=n)
    until(lambda: log.lost)
    disk.write_error = None
    until(lambda: log.healthy)
    log.close()
    lost = sum(r["lost"] for r in records(tmp_path) if r["kind"] == "gap")
    assert lost == log.lost == 9 - kinds(tmp_path).count("result")
    assert check(tmp_path).faults == []


def test_open_on_failure_waives_keeps_and_is_loud(tmp_path, disk, caplog):
    log = open_log(tmp_path, fail_open=True)
    disk.write_error = errno.ENOSPC
    assert isinstance(asyncio.run(log.append("request", n=1)), Waived)
    assert isinstance(asyncio.run(log.append("request", n=2)), Waived)
    disk.write_error = None
    until(lambda: log.healthy)
    log.close()
    assert [r["n"] for r in records(tmp_path) if r["kind"] == "request"] == [1, 2]
    loud = [r for r in caplog.records if r.levelname == "CRITICAL"]
    assert any("WITHOUT A RECORD" in r.getMessage() for r in loud)
    assert check(tmp_path).faults == []


def test_a_disk_that_hangs_refuses_after_a_while_and_then_at_once(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(writer, "_WRITE_TIMEOUT_S", 0.2)
    log = open_log(tmp_path)
    disk.hold.clear()
    assert "the disk took more than" in fails(log)
    until(lambda: not log.healthy)
    assert "the disk took more than" in fails(log)
    disk.hold.set()
    until(lambda: log.healthy)
    log.close()
    assert check(tmp_path).faults == []


def test_a_head_whose_copy_hangs_is_a_disk_that_hangs(tmp_path, monkeypatch):
    """All that comes after it waits for it."""
    monkeypatch.setattr(writer, "_WRITE_TIMEOUT_S", 0.2)
    log = open_log(tmp_path, sign_every=1)
    hold, copy = threading.Event(), folders.replace_head

    def slow(folder, line):
        hold.wait()
        copy(folder, line)

    monkeypatch.setattr(folders, "replace_head", slow)
    log.record("request")
    until(lambda: not log.healthy)
    assert "the disk took more than" in fails(log)
    hold.set()
    until(lambda: log.healthy)
    log.close()
    assert check(tmp_path).faults == []


def test_a_head_that_cannot_be_copied_is_told_once(tmp_path, caplog):
    """Without it nobody sees that the end of the log was cut off."""
    log = open_log(tmp_path, sign_every=1)
    head = tmp_path / "audit" / HEAD_FILE
    head.mkdir()
    for _ in range(6):
        log.record("request")
    until(lambda: "a cut of the log" in caplog.text)
    head.rmdir()
    log.record("request")
    log.close()
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert line.startswith(f"{head}: can't be written: Is a directory")
    assert check(tmp_path).faults == []


@pytest.mark.parametrize("fail_open", [False, True])
def test_nothing_follows_a_start_whose_head_is_not_copied_yet(tmp_path, monkeypatch, fail_open):
    """Or no server would go on with the log, had this one died."""
    copy, errors = folders.replace_head, [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    def full(folder, line):
        if errors:
            raise errors[0]
        copy(folder, line)

    monkeypatch.setattr(folders, "replace_head", full)
    log = open_log(tmp_path, fail_open=fail_open)
    log.record("start")
    log.note("policies")
    if fail_open:
        assert isinstance(asyncio.run(log.append("request")), Waived)
    else:
        assert fails(log) == os.strerror(errno.ENOSPC)
    until(lambda: not log.healthy)
    shutil.copytree(tmp_path / "audit", tmp_path / "crashed" / "audit")
    errors.clear()
    until(lambda: log.healthy)
    log.close()
    for folder in (tmp_path / "crashed", tmp_path):
        shutil.copy(tmp_path / "key.pem", tmp_path / "crashed")
        write_log(folder, 1)
        assert check(folder).faults == []
    assert kinds(tmp_path / "crashed") == ["start", "head", "request", "head"]
    assert kinds(tmp_path)[:4] == ["start", "head", "gap", "policies"]


def test_what_cannot_be_written_at_the_end_is_told(tmp_path, disk, caplog):
    log = open_log(tmp_path)
    log.record("request")
    disk.write_error = errno.ENOSPC
    for n in range(3):
        log.note("result", n=n)
    log.close()
    assert "3 records could not be written, and are lost: No space left" in caplog.text


def test_too_many_waiting_are_turned_away(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(writer, "_MAX_WAITING", 3)
    log = open_log(tmp_path)
    disk.hold.clear()

    async def write():
        asking = [asyncio.create_task(log.append("request")) for _ in range(8)]
        await asyncio.sleep(0.05)
        disk.hold.set()
        return await asyncio.gather(*asking, return_exceptions=True)

    results = asyncio.run(write())
    assert any(isinstance(r, AuditUnavailable) for r in results)
    assert any(isinstance(r, Written) for r in results)
    log.close()
    assert check(tmp_path).faults == []


@pytest.mark.parametrize("what", ["removed", "replaced", "cut", "grown"])
def test_a_file_that_others_change_is_not_written_to_blindly(tmp_path, what):
    log = open_log(tmp_path)
    for _ in range(3):
        log.record("request")
    path = last_file(tmp_path)
    raw = path.read_bytes()
    if what == "removed":
        path.unlink()
    elif what == "replaced":
        path.unlink()
        path.write_bytes(raw.replace(b"request", b"another"))
    elif what == "cut":
        path.write_bytes(raw[:-10])
    else:
        path.write_bytes(raw + b"{}\n")
    assert path.name in fails(log)
    if what == "grown":  # what isn't ours and stands behind ours can be cut off
        until(lambda: log.healthy)
    else:
        time.sleep(0.1)
        assert not log.healthy
    log.close()


def test_a_record_without_canonical_form_stops_nobody_else(tmp_path):
    log = open_log(tmp_path)
    with pytest.raises(AuditUnavailable, match="canonical"):
        asyncio.run(log.append("request", principal="\ud800"))
    log.record("request")
    log.close()
    assert check(tmp_path).faults == []


def test_permissions_are_the_owners_alone(tmp_path):
    folder = write_log(tmp_path, 8)
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in [*folder.iterdir(), tmp_path / "key.pem"]:
        assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads((folder / HEAD_FILE).read_text())["seq"] == 10
