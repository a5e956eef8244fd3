"""The files of a log: what is on disk before what, so that nothing is lost with the power.

A test can't cut the power; it sees when the operating system is told to have something on disk.
"""

import os
from pathlib import Path

import pytest

from expertgate.server.audit.chain import AuditError, digest
from expertgate.server.audit.folder import HEAD_FILE, End, files, replace_head, set_aside


@pytest.fixture
def told(monkeypatch):
    """What the operating system was told: by whose name and, of a file, at how many bytes."""
    calls = []

    def watch(name):
        call = getattr(os, name)

        def watched(file, *rest):
            if isinstance(file, int):
                path, size = Path(os.readlink(f"/proc/self/fd/{file}")), os.fstat(file).st_size
                calls.append((name, path.name) if path.is_dir() else (name, path.name, size))
            else:
                calls.append((name, file.name, rest[0].name))
            return call(file, *rest)

        monkeypatch.setattr(os, name, watched)

    for name in ("fsync", "ftruncate", "replace"):
        watch(name)
    return calls


def test_a_head_is_on_disk_as_a_whole_before_it_takes_the_place_of_the_last_one(tmp_path, told):
    (tmp_path / f".{HEAD_FILE}").write_text("what one that died left, and longer than the new one")
    replace_head(tmp_path, b"the new one\n")
    assert (tmp_path / HEAD_FILE).read_bytes() == b"the new one\n"
    assert told == [
        ("fsync", f".{HEAD_FILE}", 12),
        ("replace", f".{HEAD_FILE}", HEAD_FILE),
        ("fsync", tmp_path.name),
    ]


def test_torn_bytes_are_on_disk_beside_the_log_before_they_are_cut_from_it(tmp_path, told):
    log = tmp_path / f"{1:016}.jsonl"
    log.write_bytes(b"whole\ntorn")
    named = tmp_path / f"{log.name}.torn-{digest(b'torn')[:16]}"
    named.write_bytes(b"what one left that died as it did this")
    aside = set_aside(End(seq=1, hash="", unsigned=1, path=log, size=6, torn=b"torn"))
    assert aside == named
    assert (log.read_bytes(), aside.read_bytes()) == (b"whole\n", b"torn")
    assert told == [
        ("fsync", aside.name, 4),
        ("fsync", tmp_path.name),
        ("ftruncate", log.name, 10),
        ("fsync", log.name, 6),
    ]


def test_the_files_are_in_the_order_of_their_records(tmp_path):
    others = ("1.jsonl", "0000000000000001.jsonl.torn-0123456789abcdef", HEAD_FILE)
    numbers = (1, 9, 10, 200, 3_000_000_000)
    for name in (*others, *(f"{number:016}.jsonl" for number in reversed(numbers))):
        (tmp_path / name).touch()
    assert [int(path.stem) for path in files(tmp_path)] == list(numbers)
    with pytest.raises(AuditError, match="none: No such file"):
        files(tmp_path / "none")
