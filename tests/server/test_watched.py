"""Files that are read again when they change, and whatever is in them or happens to them."""

import asyncio

import pytest

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
