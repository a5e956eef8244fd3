"""`expertgate usage` over a log whose sums are known."""

import csv
import json

import pytest

from expertgate.server.audit import folder as folders
from expertgate.server.audit import writer
from expertgate.server.cli import main
from tests.server.audit.logs import open_log

EXPERTS = [
    {"name": "public", "owner": "ai2", "sha256": None},
    {"name": "math", "owner": "acme", "sha256": None},
    {"name": "code", "owner": "acme", "sha256": None},
]
# Day of the result → principal, computed tokens and, by expert, tokens and share.
REQUESTS = [
    (1, "alice", 10, {"public": (10, 0.5), "math": (6, 0.3), "code": (4, 0.2)}),
    (2, "alice", 20, {"public": (20, 1.0)}),
    (3, "bob", 8, {"math": (8, 0.75), "code": (8, 0.25)}),
    (4, "bob", None, {"math": None}),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    stamped = writer._stamped
    day = 1

    def at(kind, fields):
        return {**stamped(kind, fields), "time": f"2026-11-{day:02}T12:00:00.000000Z"}

    monkeypatch.setattr(writer, "_stamped", at)
    log = open_log(tmp_path, rotate_bytes=1000)
    log.record("start", catalogue="c1", experts=EXPERTS)
    for day, principal, computed, parts in REQUESTS:
        log.record("request", request=f"r{day}", principal=principal, catalogue="c1")
        used = computed and {
            "computed_tokens": computed,
            "experts": {n: {"tokens": t, "share": s} for n, (t, s) in parts.items()},
        }
        log.record("result", request=f"r{day}", effective=list(parts), usage=used)
    log.close()
    return tmp_path / "audit"


@pytest.fixture
def call(capsys):
    def call(*arguments):
        status = main(["usage", *map(str, arguments)]) or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_a_table(call, folder):
    status, out, err = call(folder, "--by", "expert")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "expert  requests  unknown  tokens  computed",
        "code           2        0    12.0       4.0",
        "math           3        1    14.0       9.0",
        "public         2        0    30.0      25.0",
    ]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("owner", {"acme": (3, 1, 26.0, 13.0), "ai2": (2, 0, 30.0, 25.0)}),
        ("principal", {"alice": (2, 0, 40.0, 30.0), "bob": (2, 1, 16.0, 8.0)}),
    ],
)
@pytest.mark.parametrize("form", ["csv", "json"])
def test_every_sum_in_every_form(call, folder, by, expected, form):
    _, out, _ = call(folder, "--by", by, "--format", form)
    rows = json.loads(out) if form == "json" else list(csv.DictReader(out.splitlines()))
    found = {
        row[by]: tuple(float(row[name]) for name in ("requests", "unknown", "tokens", "computed"))
        for row in rows
    }
    assert found == expected


def test_a_request_counts_for_who_owned_its_experts_when_it_was_permitted(call, tmp_path):
    """By the catalogue that its record names, as its receipt says, wherever that record stands."""
    log = open_log(tmp_path)
    log.record("start", catalogue="c1", experts=EXPERTS)
    log.record("request", request="before", principal="alice", catalogue="c1")
    log.record("catalogue", catalogue="c2", experts=[{**EXPERTS[1], "owner": "heirs"}])
    log.record("request", request="late", principal="alice", catalogue="c1")
    log.record("request", request="after", principal="alice", catalogue="c2")
    log.record("request", request="unknown", principal="alice", catalogue="c0")
    used = {"computed_tokens": 4, "experts": {"math": {"tokens": 4, "share": 1.0}}}
    for name in ("before", "late", "after", "unknown", "removed"):
        log.record("result", request=name, effective=["math"], usage=used)
    log.close()
    _, out, _ = call(tmp_path / "audit", "--by", "owner", "--format", "json")
    found = {row["owner"]: row["requests"] for row in json.loads(out)}
    assert found == {"acme": 2, "heirs": 1, "": 2}


def test_a_part_of_the_time(call, folder):
    since, until = "2026-11-02", "2026-11-03T12:00:00Z"
    _, out, _ = call(folder, "--by", "principal", "--from", since, "--to", until, "--format", "csv")
    assert out.splitlines()[1:] == ["alice,1,0,20.0,20.0"]


def test_the_shares_of_all_experts_are_what_was_computed(call, folder):
    _, out, _ = call(folder, "--by", "expert", "--format", "json")
    computed = sum(tokens or 0 for _, _, tokens, _ in REQUESTS)
    assert sum(row["computed"] for row in json.loads(out)) == pytest.approx(computed)


def test_a_record_that_is_being_written_is_waited_for(call, folder, monkeypatch):
    before = call(folder, "--by", "owner")
    last = max(folder.glob("*.jsonl"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    monkeypatch.setattr(folders.time, "sleep", lambda _: last.write_bytes(whole))
    assert call(folder, "--by", "owner") == before


def test_a_name_stays_within_its_row(call, tmp_path):
    log = open_log(tmp_path)
    log.record("start", catalogue="c1", experts=EXPERTS)
    log.record("request", request="r", catalogue="c1", principal="ada\x1b[2K\nbob  9  0  9.0  9.0")
    log.record("result", request="r", effective=["math"], usage=None)
    log.close()
    _, out, _ = call(tmp_path / "audit", "--by", "principal")
    assert [len(out.splitlines()), *map(str.isprintable, out.splitlines())] == [2, True, True]


def test_bad_times_and_folders(call, folder, tmp_path):
    assert call(folder, "--by", "expert", "--from", "yesterday")[0] == 2
    status, _, err = call(folder, "--by", "expert", "--from", "2026-12-01", "--to", "2026-11-01")
    assert status == 2
    assert "--to must be later than --from" in err
    for path in (tmp_path / "none", tmp_path):
        status, _, err = call(path, "--by", "expert")
        assert status == 2
        assert len(err.splitlines()) == 1


def test_without_a_folder_it_is_the_servers(call, folder, tmp_path, monkeypatch):
    expected = call(folder, "--by", "expert")
    monkeypatch.chdir(tmp_path)
    assert call("--by", "expert") == expected  # `audit`, where no configuration says otherwise
    folder.rename(tmp_path / "kept")
    config = tmp_path / "expertgate.yaml"
    config.write_text("model: m\nidentity: {api_keys: k}\npolicies: p\naudit: {path: kept}\n")
    assert call("--by", "expert") == expected
    config.write_text("audit: {path: 7}\n")
    status, out, err = call("--by", "expert")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == "expertgate: or name the log's folder"
    assert call("kept", "--by", "expert") == expected


_RESULT = (
    b'{"effective":%s,"kind":"result","prev":"","request":"r","seq":1,'
    b'"time":"2026-11-01T00:00:00Z","v":1,'
    b'"usage":{"computed_tokens":1,"experts":{"public":{"share":0.5,"tokens":%s}}}}'
)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b'{"kind":"result","prev":"","seq":1,"time":"","v":1}',
        b'{"kind":"start","prev":"","seq":1,"time":"","v":1,"experts":7}',
        b'{"kind":"request","prev":"","seq":1,"time":"","v":1}',
        _RESULT % (b'["public"]', b"1" + b"0" * 400),
        _RESULT % (b'["public", 7]', b"1"),
        _RESULT.replace(b'{"comp', b'null,"z":{"comp') % (b'[7, "a"]', b"1"),
    ],
)
def test_a_malformed_log_is_told_with_its_place(call, folder, line):
    path = max(folder.glob("*.jsonl"))
    path.write_bytes(line + b"\n")
    status, out, err = call(folder, "--by", "expert")
    assert (status, out) == (2, "")
    assert err.startswith(f"expertgate: {path}:1: ")
    assert len(err.splitlines()) == 1
