"""The writer: order, shared writes, crashes and disks that fail."""

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from types import SimpleNamespace

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


def open_files():
    return len(os.listdir("/proc/self/fd"))


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


def test_nor_does_one_that_nobody_waits_for_hold_up_the_one_before_it(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(writer, "_MOMENT_S", 1000)
    log = open_log(tmp_path)

    async def write():
        disk.hold.clear()
        asking = [asyncio.create_task(log.append("request"))]
        await asyncio.sleep(0)
        until(lambda: not log.depth)  # on its way, and held up
        asking.append(asyncio.create_task(log.append("request")))
        await asyncio.sleep(0)
        log.note("result")
        disk.hold.set()
        return await asyncio.gather(*asking)

    assert [place.seq for place in asyncio.run(write())] == [1, 2]
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
    before = open_files()
    with pytest.raises(AuditError, match="another process is writing"):
        open_log(tmp_path)
    assert open_files() <= before
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


def test_a_head_puts_off_the_next_one(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log = open_log(tmp_path)
    log.record("request")
    now[0] = writer._SIGN_AFTER_S
    until(lambda: kinds(tmp_path) == ["request", "head"])
    until(lambda: (tmp_path / "audit" / HEAD_FILE).exists())
    for _ in range(2):
        log.record("request")
    assert kinds(tmp_path) == ["request", "head", "request", "request"]
    log.close()


def test_a_file_ends_with_a_head(tmp_path):
    log = open_log(tmp_path, rotate_bytes=1, sign_every=100)
    for _ in range(2):
        log.record("request")
    assert kinds(tmp_path) == ["request", "head"] * 2
    assert len(list((tmp_path / "audit").glob("*.jsonl"))) == 2
    log.close()


def test_a_head_is_copied_once(tmp_path, monkeypatch):
    copied, copy = [], folders.replace_head
    monkeypatch.setattr(
        folders, "replace_head", lambda *given: [copied.append(given[1]), copy(*given)]
    )
    log = open_log(tmp_path, sign_every=2)
    for _ in range(6):
        log.record("request")
    log.close()
    lines = last_file(tmp_path).read_bytes().splitlines(keepends=True)
    assert copied == [line for line in lines if b'"kind":"head"' in line]


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
    assert recovered["torn_sha256"] == hashlib.sha256(torn).hexdigest()
    kept = tmp_path / "audit" / recovered["kept_as"]
    assert kept.read_bytes() == torn
    assert kept.stat().st_mode & 0o777 == 0o600
    assert any("a crash tore" in note for note in report.notes)


def test_torn_bytes_that_cannot_be_set_aside_end_the_start(tmp_path):
    write_log(tmp_path, 3)
    with last_file(tmp_path).open("ab") as file:
        file.write(b"{")
    before = last_file(tmp_path).read_bytes()
    aside = last_file(tmp_path).with_name(f"{last_file(tmp_path).name}.torn-{digest(b'{')[:16]}")
    aside.mkdir()
    for _ in range(2):  # nor does the first keep the log to itself
        with pytest.raises(AuditError, match="jsonl: Is a directory"):
            open_log(tmp_path)
    assert last_file(tmp_path).read_bytes() == before
    aside.rmdir()
    write_log(tmp_path, 1)
    assert check(tmp_path).faults == []


@pytest.mark.parametrize("torn", [b"", b"{"])
def test_a_file_begun_in_the_moment_of_the_crash(tmp_path, torn):
    write_log(tmp_path, 3)
    (tmp_path / "audit" / f"{5:016}.jsonl").write_bytes(torn)
    write_log(tmp_path, 1)
    assert check(tmp_path).faults == []
    kept = [path.read_bytes() for path in (tmp_path / "audit").glob("*.torn-*")]
    assert kept == ([torn] if torn else [])
    assert kinds(tmp_path)[4:] == [*["recovered"] * len(kept), "request", "head"]


def test_a_file_before_it_is_torn_by_no_crash(tmp_path):
    """A server begins another one only when what is in it is on disk."""
    write_log(tmp_path, 3)
    with last_file(tmp_path).open("ab") as file:
        file.write(b"{")
    (tmp_path / "audit" / f"{5:016}.jsonl").touch()
    with pytest.raises(AuditError, match="begins at record 5, after record 4"):
        open_log(tmp_path)


def test_a_crash_in_a_file_that_has_no_head_yet(tmp_path):
    """The last one is in the file before."""
    log = open_log(tmp_path, rotate_bytes=1000, sign_every=100)
    while len(list((tmp_path / "audit").glob("*.jsonl"))) < 2:
        log.record("request")
    shutil.copytree(tmp_path / "audit", tmp_path / "crashed" / "audit")
    shutil.copy(tmp_path / "key.pem", tmp_path / "crashed")
    log.close()
    write_log(tmp_path / "crashed", 1)
    assert check(tmp_path / "crashed").faults == []


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


@pytest.fixture(params=[4])
def left(tmp_path, request):
    """Four records that nobody has signed, one less than are signed together, and torn bytes."""
    log = open_log(tmp_path)
    log.record("start")
    raw = last_file(tmp_path).read_bytes()
    log.close()
    (tmp_path / "audit" / HEAD_FILE).write_bytes(raw.splitlines()[1])
    prev = digest(raw.splitlines()[1])
    for seq in range(3, 3 + request.param):
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
    assert kinds(left)[6:9] == ["recovered", "start", "head"]
    log.record("stop")
    log.close()
    assert kinds(left)[9:] == ["stop", "head"]  # from there on all is signed again
    report = check(left)
    assert report.faults == []
    assert any("4 records before this start were not signed" in note for note in report.notes)
    vouched = [record["kind"] for record, _ in lately(left / "audit", public_keys(left))]
    assert "request" not in vouched


@pytest.mark.parametrize("left", [1, 4], indirect=True)
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


@pytest.mark.parametrize("length", [7, 9])
def test_a_log_cut_behind_a_signed_head_is_not_gone_on_from(tmp_path, length):
    write_log(tmp_path, 8)  # which the tenth record signs
    path = last_file(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:length]))
    with pytest.raises(AuditError, match=f"ends at record {length}, but"):
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


def test_a_last_file_under_another_name_is_not_gone_on_from(tmp_path):
    write_log(tmp_path, 8, rotate_bytes=1000)
    path = last_file(tmp_path)
    path.rename(path.with_name(f"{int(path.stem) + 1:016}.jsonl"))
    with pytest.raises(AuditError, match="begins at record"):
        open_log(tmp_path)


def test_a_signed_log_without_its_head_file_is_not_gone_on_from(tmp_path):
    write_log(tmp_path, 3)
    (tmp_path / "audit" / HEAD_FILE).unlink()
    with pytest.raises(AuditError, match=r"head\.json: is missing.* Move this folder away"):
        open_log(tmp_path)
    (tmp_path / "audit").rename(tmp_path / "kept")
    write_log(tmp_path, 1)
    assert check(tmp_path).faults == []


def test_nor_is_one_whose_last_file_has_a_start_alone(tmp_path):
    log = open_log(tmp_path, rotate_bytes=1)  # a file for each
    log.record("request")
    log.record("start")
    log.close()
    assert len(list((tmp_path / "audit").glob("*.jsonl"))) == 2
    (tmp_path / "audit" / HEAD_FILE).unlink()
    with pytest.raises(AuditError, match=r"head\.json: is missing"):
        open_log(tmp_path)


def test_a_first_start_that_died_before_it_could_copy_its_head_is_gone_on_from(tmp_path):
    for torn in (b"{", b""):  # nor could the second
        log = open_log(tmp_path)
        log.record("start")
        log.close()
        (tmp_path / "audit" / HEAD_FILE).unlink()
        with last_file(tmp_path).open("ab") as file:
            file.write(torn)
    assert kinds(tmp_path) == ["start", "head", "recovered", "start", "head"]
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
def test_a_failing_disk_refuses_and_a_mended_one_goes_on(tmp_path, disk, error, what, caplog):
    log = open_log(tmp_path)
    log.record("request", n=1)
    setattr(disk, what, error)
    assert os.strerror(error) in fails(log)
    assert not log.healthy
    assert os.strerror(error) in fails(log)  # at once, as long as it is so
    log.note("result", n=2)
    tried = disk.writes
    until(lambda: disk.writes >= tried + 3)
    setattr(disk, what, None)
    until(lambda: log.healthy)
    asyncio.run(log.append("request", n=3))
    log.close()
    # However often it was tried.
    assert [r.levelname for r in caplog.records] == ["CRITICAL", "WARNING"]
    (gap,) = (r for r in records(tmp_path) if r["kind"] == "gap")
    assert (gap["lost"], gap["why"]) == (0, os.strerror(error))
    found = [r for r in records(tmp_path) if r["kind"] in ("request", "result")]
    assert [r["n"] for r in found] == [1, 2, 3]  # what was refused is not there
    assert check(tmp_path).faults == []
    assert log.lost == 0


def test_a_disk_that_fails_is_tried_once_in_a_tick_and_a_stop_waits_for_none(
    tmp_path, disk, monkeypatch
):
    monkeypatch.setattr(writer, "_TICK_S", 1000)
    log = open_log(tmp_path)
    disk.write_error = errno.ENOSPC
    fails(log)
    log.note("result")
    time.sleep(0.1)
    assert disk.writes == 1
    disk.write_error = None
    log.close()
    assert kinds(tmp_path) == ["gap", "result", "head"]


@pytest.mark.parametrize("size", [1, (1 << 16) - 1, 1 << 16, 3 << 20])
def test_a_last_record_of_any_length_is_known_again_after_a_disk_that_failed(tmp_path, disk, size):
    """What is wrong with thousands of policies is long."""
    log = open_log(tmp_path, rotate_bytes=1 << 23)
    log.record("request")
    log.record("policies_refused", fault="x" * size)
    disk.write_error = errno.ENOSPC
    fails(log)
    disk.write_error = None
    until(lambda: log.healthy)
    log.close()
    assert kinds(tmp_path) == ["request", "policies_refused", "gap", "head"]
    assert check(tmp_path).faults == []


def test_records_keep_their_order_while_the_disk_fails(tmp_path, disk):
    log = open_log(tmp_path)
    disk.write_error = errno.ENOSPC
    disk.hold.clear()
    log.note("result", n=0)
    until(lambda: not log.depth)  # on its way, and held up
    for n in range(1, 4):
        log.note("result", n=n)
    disk.hold.set()
    until(lambda: not log.healthy)
    disk.write_error = None
    log.close()
    assert [r["n"] for r in records(tmp_path) if r["kind"] == "result"] == [0, 1, 2, 3]


def test_what_was_asked_by_someone_who_left_is_kept_however_often_the_disk_fails(tmp_path, disk):
    """Nobody told them that it isn't on record."""
    log = open_log(tmp_path)

    async def leave():
        disk.hold.clear()
        asking = asyncio.create_task(log.append("request"))
        await asyncio.sleep(0)
        asking.cancel()
        disk.write_error = errno.ENOSPC
        disk.hold.set()
        await asyncio.wait([asking])

    asyncio.run(leave())
    until(lambda: disk.writes >= 3)
    disk.write_error = None
    until(lambda: log.healthy)
    log.close()
    assert kinds(tmp_path) == ["gap", "request", "head"]


def test_a_file_that_cannot_even_be_closed_ends_nothing_else(tmp_path, disk, monkeypatch):
    """As NFS says of what it has not written yet."""
    log = open_log(tmp_path)
    log.record("request")
    close = os.close

    def failing(file):
        close(file)
        if threading.current_thread().name == "audit-log":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patched:
        patched.setattr(logfile.os, "close", failing)
        disk.write_error = errno.EDQUOT
        assert os.strerror(errno.EDQUOT) in fails(log)
        disk.write_error = None
    until(lambda: log.healthy)
    log.record("request")
    log.close()
    assert check(tmp_path).faults == []


def test_what_a_failed_write_left_is_off_the_disk_before_the_next(tmp_path, disk, monkeypatch):
    """It was refused, and would else be there after a power cut."""
    log = open_log(tmp_path)
    log.record("request")
    disk.sync_error = errno.EIO
    fails(log)
    done = []

    def watch(name):
        call = getattr(os, name)

        def watched(file, *rest):
            if os.readlink(f"/proc/self/fd/{file}") == str(last_file(tmp_path)):
                done.append(name)
            return call(file, *rest)

        monkeypatch.setattr(logfile.os, name, watched)

    for name in ("ftruncate", "fsync", "write"):
        watch(name)
    disk.sync_error = None
    until(lambda: log.healthy)
    assert done[-3:] == ["ftruncate", "fsync", "write"]
    log.close()


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


@pytest.mark.parametrize("fail_open", [False, True])
def test_what_is_kept_is_bounded_and_the_loss_is_told(tmp_path, disk, monkeypatch, fail_open):
    monkeypatch.setattr(writer, "_MAX_KEPT", 5)
    log = open_log(tmp_path, fail_open=fail_open, sign_every=100)
    log.record("start")

    def keep(n):
        if fail_open:
            assert isinstance(asyncio.run(log.append("request", n=n)), Waived)
            return None
        return log.note("result", n=n)

    for beyond in (4, 2):  # a gap counts what was lost since the one before it
        disk.write_error = errno.ENOSPC
        log.note("stop")
        until(lambda: not log.healthy)
        disk.hold.clear()
        keep(0)
        until(lambda: not log.depth)  # on its way, and held up
        kept = [keep(n) for n in range(1, 6 + beyond)]
        disk.write_error = None
        disk.hold.set()
        until(lambda: log.healthy and not log.depth)
        if not fail_open:
            lost = [future.exception(20) is not None for future in kept]
            assert lost == [False] * 5 + [True] * beyond
        log.record("stop")
    log.close()
    found = records(tmp_path)
    assert [r["n"] for r in found if "n" in r] == [*range(6), *range(6)]
    assert [r["lost"] for r in found if r["kind"] == "gap"] == [0, 4, 0, 2]
    assert log.lost == 6
    assert check(tmp_path).faults == []


def test_open_on_failure_waives_keeps_and_is_loud(tmp_path, disk, caplog):
    log = open_log(tmp_path, fail_open=True)
    disk.write_error = errno.ENOSPC
    assert isinstance(asyncio.run(log.append("request", n=1)), Waived)
    assert isinstance(asyncio.run(log.append("request", n=2)), Waived)
    tried = disk.writes
    until(lambda: disk.writes >= tried + 3)
    disk.write_error = None
    until(lambda: log.healthy)
    log.close()
    assert [r["n"] for r in records(tmp_path) if r["kind"] == "request"] == [1, 2]
    loud = [r for r in caplog.records if r.levelname == "CRITICAL"]
    assert len(loud) > 2  # each time, or a log that is turned over would be quiet about it
    assert all("WITHOUT A RECORD" in r.getMessage() for r in loud)
    assert check(tmp_path).faults == []


def test_a_disk_that_hangs_refuses_after_a_while_and_then_at_once(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(writer, "_WRITE_TIMEOUT_S", 0.2)
    log = open_log(tmp_path)
    disk.hold.clear()
    assert "the disk took more than" in fails(log)
    until(lambda: not log.healthy)
    assert "the disk took more than" in fails(log)
    assert log.depth == 0  # nothing of it waits
    disk.hold.set()
    until(lambda: log.healthy)
    log.close()
    assert kinds(tmp_path).count("request") == 1  # of the first, which was told that it may be
    assert check(tmp_path).faults == []


def test_a_thread_that_waits_for_a_disk_that_hangs_is_told(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(writer, "_WRITE_TIMEOUT_S", 0.2)
    log = open_log(tmp_path)
    disk.hold.clear()
    with pytest.raises(AuditUnavailable, match="the disk took more than"):
        log.record("start")
    disk.hold.set()
    log.close()


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


def test_a_head_whose_copy_failed_is_copied_after_the_next_write(tmp_path, monkeypatch):
    copy, errors = folders.replace_head, []

    def failing(folder, line):
        if errors:
            raise errors.pop()
        copy(folder, line)

    def copied():
        return json.loads((tmp_path / "audit" / HEAD_FILE).read_bytes())["seq"]

    monkeypatch.setattr(folders, "replace_head", failing)
    log = open_log(tmp_path, sign_every=2)
    log.record("request")
    log.record("request")
    until((tmp_path / "audit" / HEAD_FILE).exists)
    assert copied() == 3
    errors.append(OSError(errno.EIO, os.strerror(errno.EIO)))
    log.record("request")
    log.record("request")
    until(lambda: not errors)
    assert copied() == 3
    log.record("request")  # without a head of its own
    until(lambda: copied() == 6)
    log.close()


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
    until(head.is_file)
    head.unlink()
    head.mkdir()
    for _ in range(6):
        log.record("request")
    until(lambda: caplog.text.count("a cut of the log") == 2)  # for it is another time
    head.rmdir()
    log.close()
    lines = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(lines) == 2
    assert all(line.startswith(f"{head}: can't be written: Is a directory") for line in lines)
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
    log.note("result")
    until(lambda: not log.depth)  # on its way, and held up

    async def write():
        asking = [asyncio.create_task(log.append("request")) for _ in range(5)]
        await asyncio.sleep(0.05)
        disk.hold.set()
        return await asyncio.gather(*asking, return_exceptions=True)

    results = asyncio.run(write())
    assert [type(r) for r in results] == [Written] * 3 + [AuditUnavailable] * 2
    log.close()
    assert check(tmp_path).faults == []


@pytest.mark.parametrize("what", ["removed", "replaced", "cut", "cut by its last byte", "grown"])
def test_a_file_that_others_change_is_not_written_to_blindly(tmp_path, what):
    signing_key(tmp_path)
    before = open_files()
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
    elif what == "cut by its last byte":
        path.write_bytes(raw[:-1])
    else:
        path.write_bytes(raw + b"{}\n")
    assert path.name in fails(log)
    if what == "grown":  # what isn't ours and stands behind ours can be cut off
        until(lambda: log.healthy)
    else:
        time.sleep(0.1)
        assert not log.healthy
        assert path.exists() == (what != "removed")
    log.close()
    assert open_files() <= before


def test_a_record_without_canonical_form_stops_nobody_else(tmp_path, disk):
    log = open_log(tmp_path)
    disk.hold.clear()
    log.note("result")
    until(lambda: not log.depth)  # on its way, and held up

    async def write():
        names = ("\ud800", "alice")
        asking = [asyncio.create_task(log.append("request", principal=name)) for name in names]
        await asyncio.sleep(0.05)
        disk.hold.set()
        return await asyncio.gather(*asking, return_exceptions=True)

    bad, good = asyncio.run(write())
    assert isinstance(bad, AuditUnavailable)
    assert "canonical" in str(bad)
    assert good.seq == 2
    log.record("request")
    log.close()
    assert kinds(tmp_path) == ["result", "request", "gap", "request", "head"]
    assert records(tmp_path)[2]["lost"] == log.lost == 1
    assert check(tmp_path).faults == []


def test_nor_is_it_lost_more_than_once_where_the_disk_fails_meanwhile(tmp_path, disk):
    log = open_log(tmp_path)
    disk.write_error = errno.ENOSPC
    fails(log)
    log.note("result", principal="\ud800")
    until(lambda: log.lost)
    tried = disk.writes
    until(lambda: disk.writes >= tried + 3)
    assert log.lost == 1
    disk.write_error = None
    log.close()


def test_permissions_are_the_owners_alone(tmp_path):
    folder = write_log(tmp_path, 8)
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in [*folder.iterdir(), tmp_path / "key.pem"]:
        assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads((folder / HEAD_FILE).read_text())["seq"] == 10
