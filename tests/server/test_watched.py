"""Files that are read again when they change, and whatever is in them or happens to them."""

import asyncio
import os
import threading

import pytest

from expertgate.server.plain_file import MAX_BYTES
from expertgate.server.watched import WatchedFile


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "file"
    made.write_bytes(b"one")
    return made


def looks(file, times=2):
    async def go():
        return [await file.refresh() for _ in range(times)]

    return asyncio.run(go())


def read(raw, path):
    return raw


def test_a_change_is_in_force_once_two_looks_saw_the_same(path):
    file = WatchedFile(path, read)
    path.write_bytes(b"two, longer")
    assert looks(file) == [False, True]
    assert file.value == b"two, longer"


@pytest.mark.parametrize("error", [ValueError, KeyError, RecursionError, TypeError])
def test_what_cannot_be_read_leaves_the_old_in_force_whatever_its_fault(path, error, caplog):
    """Whoever looks would end by any other error, and nothing be seen to change any more."""

    def parse(raw, path):
        if raw != b"one":
            raise error("of this kind")
        return raw

    file = WatchedFile(path, parse)
    path.write_bytes(b"broken")
    assert looks(file, 4) == [False] * 4
    assert file.value == b"one"
    (line,) = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert "of this kind" in line
    path.write_bytes(b"one")
    assert looks(file) == [False, True]


@pytest.mark.parametrize("where", ["thread", "parse"])
def test_what_fails_by_nothing_in_the_file_is_tried_again(path, where, caplog, monkeypatch):
    """Of a change that nobody looks at twice, such as a key that is revoked, nothing would come."""
    errors = [MemoryError(), RuntimeError("can't start new thread")]

    def failing(go_on):
        def call(*arguments):
            if errors:
                raise errors.pop()
            return go_on(*arguments)

        return call

    file = WatchedFile(path, read)
    if where == "parse":
        monkeypatch.setattr(file, "_parse", failing(read))
    if where == "thread":
        monkeypatch.setattr(threading.Thread, "start", failing(threading.Thread.start))
    path.write_bytes(b"two, longer")
    assert looks(file, 5) == [False, False, False, True, False]
    assert file.value == b"two, longer"
    assert caplog.text.count("what was read before stays in force") == 2


def test_what_changes_while_it_is_read_waits_for_another_look(path):
    """What was read may be half of each."""
    changes = [b"three"]

    def parse(raw, path):
        if raw != b"one" and changes:
            path.write_bytes(changes.pop())
        return raw

    file = WatchedFile(path, parse)
    path.write_bytes(b"two, longer")
    assert looks(file) == [False, False]
    assert file.value == b"one"
    assert looks(file) == [False, True]
    assert file.value == b"three"


def test_what_is_no_file_is_not_waited_for(path, caplog):
    """Whoever opens a pipe waits for somebody who writes, and nobody would look any more."""
    file = WatchedFile(path, read)
    path.unlink()
    os.mkfifo(path)
    # Lets go of whoever waits all the same.
    freeing = threading.Timer(10, lambda: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK)))
    freeing.start()
    assert looks(file, 3) == [False] * 3
    freeing.cancel()
    assert file.value == b"one"
    assert "must be a file" in caplog.text
    path.unlink()
    path.write_bytes(b"two, longer")
    assert looks(file) == [False, True]


def test_a_device_is_none(path):
    """Some have no end."""
    file = WatchedFile(path, read)
    path.unlink()
    path.symlink_to("/dev/null")
    assert looks(file, 3) == [False] * 3
    assert file.value == b"one"
    with pytest.raises(OSError, match="must be a file"):
        WatchedFile(path, read)


def test_what_is_far_too_large_is_not_read(path, caplog):
    """It would take all memory there is, and requests wait for some of these files."""
    file = WatchedFile(path, read)
    os.truncate(path, MAX_BYTES + 1)
    assert looks(file, 3) == [False] * 3
    assert file.value == b"one"
    assert f"must have at most {MAX_BYTES}" in caplog.text
    os.truncate(path, MAX_BYTES)
    assert looks(file) == [False, True]
