"""What `verify` must find: each way to change a log that was closed in order."""

import json
import os

import pytest
import rfc8785
from click.testing import CliRunner

from expertgate.server.audit import folder as folders
from expertgate.server.audit.chain import GENESIS, AuditError, digest, line_of
from expertgate.server.audit.command import audit
from expertgate.server.audit.folder import HEAD_FILE
from expertgate.server.audit.signing import SigningKey
from expertgate.server.audit.verify import verify
from tests.server.audit.logs import (
    check,
    open_log,
    public_keys,
    records,
    signing_key,
    write_log,
)


@pytest.fixture
def folder(tmp_path):
    """Twelve requests, and a head after every five: 1-5 H 7-11 H 13-14 H."""
    write_log(tmp_path, 12)
    assert [r["seq"] for r in records(tmp_path) if r["kind"] == "head"] == [6, 12, 15]
    return tmp_path


def file_of(folder):
    (path,) = (folder / "audit").glob("*.jsonl")
    return path


def lines_of(folder):
    return file_of(folder).read_bytes().splitlines(keepends=True)


def rewrite(folder, lines):
    file_of(folder).write_bytes(b"".join(lines))


def rechained(lines, start):
    """The lines with every `prev` from `start` on made to fit; nobody can make the signatures."""
    for index in range(start, len(lines)):
        record = json.loads(lines[index])
        record["prev"] = digest(lines[index - 1][:-1])
        lines[index] = line_of(record) + b"\n"
    return lines


def test_an_untouched_log_holds(folder):
    report = check(folder)
    assert report.faults == []
    assert (report.records, report.first, report.last) == (15, 1, 15)
    assert (report.heads, report.unsigned) == (3, 0)


@pytest.mark.parametrize("line", range(15))
def test_any_edit_is_found_at_its_place(folder, line):
    lines = lines_of(folder)
    lines[line] = lines[line].replace(b"T", b"t", 1)  # within its time
    rewrite(folder, lines)
    faults = check(folder).faults
    assert faults
    # A line is known to be another by the next one's `prev`, or by its own signature.
    assert f":{line + 1}:" in faults[0] or f":{line + 2}:" in faults[0] or HEAD_FILE in faults[0]


@pytest.mark.parametrize("line", range(15))
def test_any_deletion_is_found_at_its_place(folder, line):
    lines = lines_of(folder)
    del lines[line]
    rewrite(folder, lines)
    faults = check(folder).faults
    if line < 14:
        assert f":{line + 1}: record {line + 1} is missing" in faults[0]
    else:
        assert "its end was cut off" in faults[0]


@pytest.mark.parametrize("line", range(14))
def test_any_swap_of_two_neighbours_is_found(folder, line):
    lines = lines_of(folder)
    lines[line], lines[line + 1] = lines[line + 1], lines[line]
    rewrite(folder, lines)
    assert f":{line + 1}:" in check(folder).faults[0]


@pytest.mark.parametrize("length", range(1, 15))
def test_any_truncation_is_found(folder, length):
    rewrite(folder, lines_of(folder)[:length])
    assert any("its end was cut off" in fault for fault in check(folder).faults)


def test_a_repeated_and_an_inserted_line_are_found(folder):
    lines = lines_of(folder)
    rewrite(folder, [*lines[:4], lines[3], *lines[4:]])
    assert ":5: record 4 is out of its order" in check(folder).faults[0]
    made_up = line_of({**json.loads(lines[3]), "seq": 5, "prev": digest(lines[3][:-1])}) + b"\n"
    rewrite(folder, [*lines[:4], made_up, *lines[4:]])
    assert ":6: record 5 is out of its order" in check(folder).faults[0]


def test_an_edit_with_the_chain_made_anew_breaks_the_signatures(folder):
    lines = lines_of(folder)
    lines[1] = line_of({**json.loads(lines[1]), "request": "another"}) + b"\n"
    rewrite(folder, rechained(lines, 2))
    assert [fault.split(": ")[1] for fault in check(folder).faults[:3]] == [
        "the signature of this head doesn't hold"
    ] * 3


def test_a_head_moved_to_another_place_does_not_sign_it(folder):
    lines = lines_of(folder)
    early = json.loads(lines[5])
    late = json.loads(lines[11])
    lines[11] = line_of({**late, "signature": early["signature"]}) + b"\n"
    rewrite(folder, lines)
    assert ":12: the signature of this head doesn't hold" in check(folder).faults[0]


def test_history_written_anew_without_heads_is_found(folder):
    lines = lines_of(folder)[:6]
    for seq in range(7, 20):
        record = {**json.loads(lines[0]), "seq": seq, "prev": digest(lines[-1][:-1])}
        lines.append(line_of(record) + b"\n")
    rewrite(folder, lines)
    head = folder / "audit" / HEAD_FILE
    head.write_bytes(lines[5])  # an old one, so that the copy fits as well
    assert any("no signed head for 5 records" in fault for fault in check(folder).faults)


def without_heads(folder):
    """All records but the heads, numbered and chained as if there had never been any."""
    lines = []
    for line in lines_of(folder):
        record = json.loads(line)
        if record["kind"] != "head":
            record["seq"] = len(lines) + 1
            lines.append(line_of(record) + b"\n")
    return rechained([line_of({**json.loads(lines[0]), "prev": GENESIS}) + b"\n", *lines[1:]], 1)


def test_a_log_without_any_head_is_nobodys(folder):
    rewrite(folder, without_heads(folder))
    (folder / "audit" / HEAD_FILE).unlink()
    (fault,) = check(folder).faults
    assert "no signed head" in fault
    assert "anybody could have written it" in fault


def test_nor_does_a_server_that_starts_make_it_its_own(folder):
    """Which it refuses; here somebody had it start on an empty folder, and joined the two."""
    forged = without_heads(folder)[:4]  # fewer than a server may leave unsigned
    (folder / "audit" / HEAD_FILE).unlink()
    rewrite(folder, forged)
    key, place = signing_key(folder), {"seq": 5, "prev": digest(forged[-1][:-1])}
    start = line_of({**json.loads(forged[0]), "kind": "start", **place})
    head = {"kind": "head", "key": key.id, "every": 5, "seq": 6, "prev": digest(start)}
    signed = line_of(key.sign_head({**json.loads(forged[0]), **head}))
    rewrite(folder, [*forged, start + b"\n", signed + b"\n"])
    (folder / "audit" / HEAD_FILE).write_bytes(signed)
    (fault,) = check(folder).faults
    assert ":5: no signed head before this start" in fault


def test_more_than_a_head_may_wait_for_before_the_first_one(folder):
    lines = without_heads(folder)
    key = signing_key(folder)
    place = {"seq": 13, "prev": digest(lines[-1][:-1])}
    head = {**json.loads(lines[0]), "kind": "head", "key": key.id, "every": 5, **place}
    signed = line_of(key.sign_head(head))
    rewrite(folder, [*lines, signed + b"\n"])
    (folder / "audit" / HEAD_FILE).write_bytes(signed)
    (fault,) = check(folder).faults
    assert ":13: no signed head for 5 records" in fault


def test_what_a_crash_left_unsigned_is_noted_for_good(tmp_path):
    def start():
        log = open_log(tmp_path)
        log.record("start")
        return log

    log = start()
    for _ in range(3):
        log.record("request")
    raw = file_of(tmp_path).read_bytes()
    log.close()
    lines = raw.splitlines(keepends=True)
    rewrite(tmp_path, lines)  # as a crash would leave it
    (tmp_path / "audit" / HEAD_FILE).write_bytes(lines[1])
    start().close()
    start().close()
    report = check(tmp_path)
    assert report.faults == []
    (note,) = report.notes
    assert ":6: 3 records before this start were not signed yet" in note


def test_so_is_a_start_that_nobody_signed(tmp_path):
    """It could say anything of experts, owners and policies."""

    def start():
        log = open_log(tmp_path)
        log.record("start", model="toy")
        log.close()

    start()
    lines = lines_of(tmp_path)
    head = json.loads(lines[-1])
    place = {"seq": head["seq"] + 1, "prev": digest(lines[-1][:-1])}
    forged = line_of({**json.loads(lines[0]), "model": "other", **place})
    rewrite(tmp_path, [*lines, forged + b"\n"])
    start()
    report = check(tmp_path)
    assert report.faults == []
    (note,) = report.notes
    assert ":4: 1 record before this start was not signed yet" in note


def test_a_folder_put_back_to_an_earlier_state_needs_a_head_from_elsewhere(folder, tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_bytes((folder / "audit" / HEAD_FILE).read_bytes())
    lines = lines_of(folder)
    rewrite(folder, lines[:12])
    (folder / "audit" / HEAD_FILE).write_bytes(lines[11])
    assert check(folder).faults == []  # as the docs say
    assert "its end was cut off" in check(folder, head=kept).faults[0]


def test_a_head_from_elsewhere_must_be_the_logs_own(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "key.pem").write_bytes((folder / "key.pem").read_bytes())
    write_log(other, 12)
    faults = check(folder, head=other / "audit" / HEAD_FILE).faults
    assert len(faults) == 1
    assert "the log has another record 15" in faults[0]


def test_a_missing_copy_of_the_head_is_found(folder):
    (folder / "audit" / HEAD_FILE).unlink()
    assert "is missing" in check(folder).faults[0]


def test_another_spelling_of_a_record_is_found(folder):
    lines = lines_of(folder)
    for other in (
        lines[2].replace(b'"v":1', b'"v": 1'),
        lines[2].replace(b'"v":1', b'"v":1,"v":1'),
        lines[2].replace(b"r2", b"\\u0072\\u0032"),
        lines[2][:-1] + b"\r\n",
    ):
        assert other != lines[2]
        rewrite(folder, [*lines[:2], other, *lines[3:]])
        assert ":3: is not in canonical form" in check(folder).faults[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"{}", "has no 'v'"),
        (b'{"kind":"x","prev":"","seq":true,"time":"","v":1}', "has no 'seq'"),
        (b'{"kind":"x","prev":"","seq":1,"time":"","v":2}', "is of version 2"),
        (b'{"kind":"x","prev":"","seq":1,"time":"","v":1,"z":1e400}', "no canonical form"),
        (b'{"kind":"x","prev":"","seq":1,"time":"","v":1,"z":9999999999999999}', "no canonical"),
        (b'{"kind":"\\ud800","prev":"","seq":1,"time":"","v":1}', "no canonical form"),
    ],
)
def test_a_line_that_is_no_record(folder, line, words):
    lines = lines_of(folder)
    rewrite(folder, [*lines[:2], line + b"\n", *lines[3:]])
    fault = check(folder).faults[0]
    assert ":3: " in fault
    assert words in fault


def test_another_servers_key_is_told(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    SigningKey.create(other / "key.pem")
    faults = verify(folder / "audit", public_keys(other)).faults
    assert all("the head is signed by another key" in fault for fault in faults)
    assert HEAD_FILE in faults[-1]


def test_a_copy_of_the_head_that_another_key_signed_is_found_with_a_key_or_without(
    folder, tmp_path
):
    other = tmp_path / "other"
    other.mkdir()
    head = json.loads((folder / "audit" / HEAD_FILE).read_bytes())
    del head["signature"]
    forged = signing_key(other).sign_head({**head, "key": signing_key(other).id})
    (folder / "audit" / HEAD_FILE).write_bytes(line_of(forged))
    assert "another key" in check(folder).faults[-1]
    assert "another record" in verify(folder / "audit", None).faults[-1]


def test_without_a_key_the_chain_alone_is_checked(folder):
    report = verify(folder / "audit", None)
    assert (report.faults, report.heads) == ([], 0)


def test_files_follow_each_other(tmp_path):
    write_log(tmp_path, 40, rotate_bytes=2000)
    paths = sorted((tmp_path / "audit").glob("*.jsonl"))
    assert len(paths) > 3
    assert all(json.loads(p.read_bytes().splitlines()[-1])["kind"] == "head" for p in paths)
    assert check(tmp_path).faults == []

    gone = paths[1].read_bytes()
    paths[1].unlink()
    assert f"{paths[2].name}:1: records" in check(tmp_path).faults[0]
    paths[1].write_bytes(gone)

    first = json.loads(paths[2].read_bytes().splitlines()[0])["seq"]
    paths[0].unlink()
    paths[1].unlink()
    assert "records 1 to" in check(tmp_path).faults[0]
    assert check(tmp_path, first=first).faults == []
    os.rename(paths[2], paths[2].with_name(f"{first - 1:016}.jsonl"))
    assert "unlike the file's name" in check(tmp_path, first=first).faults[0]


def test_a_file_alone_can_be_checked(tmp_path):
    write_log(tmp_path, 40, rotate_bytes=2000)
    paths = sorted((tmp_path / "audit").glob("*.jsonl"))
    first = json.loads(paths[1].read_bytes().splitlines()[0])["seq"]
    report = verify(paths[1], public_keys(tmp_path), first=first)
    assert report.faults == []
    assert report.heads >= 1


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(AuditError, match="has no log"):
        verify(tmp_path, None)
    with pytest.raises(AuditError, match="No such file"):
        verify(tmp_path / "none", None)


def test_a_running_log_is_signed_in_part(tmp_path):
    log = open_log(tmp_path)
    for _ in range(7):
        log.record("request")
    report = check(tmp_path)
    assert (report.faults, report.unsigned) == ([], 2)
    log.close()


def test_a_line_that_is_being_written_is_waited_for(folder, monkeypatch):
    whole = file_of(folder).read_bytes()
    file_of(folder).write_bytes(whole[:-100])
    assert "the file ends in the middle of a record" in check(folder).faults[0]
    monkeypatch.setattr(folders.time, "sleep", lambda _: file_of(folder).write_bytes(whole))
    assert check(folder).faults == []


def test_lines_are_canonical_json_of_rfc_8785(folder):
    for line in lines_of(folder):
        assert rfc8785.dumps(json.loads(line)) == line[:-1]


def test_of_many_faults_the_first_are_told_and_that_there_may_be_more(folder):
    for place in range(2, 40):  # a file for each, or the first fault ends the reading
        (folder / "audit" / f"{place:016}.jsonl").write_bytes(b"junk\n")
    result = CliRunner().invoke(audit, ["verify", str(folder / "audit")])
    lines = result.stderr.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "there may be more: stopped after 20 faults"


def nested(depth):
    """JSON that can be read, and that takes more of the stack to be written."""
    return b'{"kind":"head","prev":"","seq":1,"time":"","v":1,"z":%s}' % (
        b"[" * depth + b"]" * depth
    )


@pytest.mark.parametrize("depth", [100, 300, 450, 700, 900])
def test_a_deep_record_is_a_fault_and_ends_nothing(folder, depth):
    lines = lines_of(folder)
    rewrite(folder, [*lines[:2], nested(depth) + b"\n", *lines[3:]])
    assert len(check(folder).faults) >= 1


@pytest.mark.parametrize("key", ["[]", "{}", "null", "7", "true"])
def test_a_head_that_names_no_key_at_all(folder, key):
    lines = lines_of(folder)
    head = b'{"every":5,"key":%s,"kind":"head","prev":"%s","seq":3,"signature":"","time":"","v":1}'
    line = head % (key.encode(), b"0" * 64)
    rewrite(folder, [*lines[:2], line + b"\n", *lines[3:]])
    assert any(":3: the head is signed by another key" in fault for fault in check(folder).faults)
