import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from expertgate.server.cli import main
from expertgate.server.keys import KeysError, KeyStore
from expertgate.server.keys_command import keys


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call("create", *arguments)


def call(*arguments):
    return CliRunner().invoke(keys, arguments)


def test_the_secret_is_all_there_is_on_stdout(run, tmp_path):
    result = run("--id", "alice", "--group", "research", "--group", "staff")
    assert result.exit_code == 0
    secret = result.stdout.removesuffix("\n")
    principal = KeyStore(tmp_path / "keys.yaml").find(secret).key
    assert (principal.id, principal.groups) == ("alice", {"research", "staff"})
    assert secret not in result.stderr
    assert "keys.yaml" in result.stderr


def test_the_file_is_that_of_the_configuration_that_is_there(run, tmp_path):
    """A key in another file would be one that the server doesn't know, or doesn't forget."""
    config = tmp_path / "expertgate.yaml"
    (tmp_path / "secrets").mkdir()
    config.write_text("identity: {api_keys: secrets/k.yaml}\npolicies: policies\n")
    assert run("--id", "alice").exit_code == 0
    assert call("list").stdout.splitlines()[1].startswith("alice")
    assert (tmp_path / "secrets" / "k.yaml").exists()
    assert run("--id", "bob", "--file", "keys.yaml").exit_code == 0
    assert [line.split()[0] for line in call("list").stdout.splitlines()] == ["ID", "alice"]
    config.write_text("identity: {anonymous: true}\npolicies: policies\n")
    result = call("list")
    assert result.exit_code == 2
    assert "expertgate.yaml has no identity.api_keys; name a file" in result.stderr


def test_a_configuration_that_is_broken_is_told_and_can_be_passed_by(run, tmp_path, capsys):
    (tmp_path / "expertgate.yaml").write_text("identity: [\n")
    assert main(["keys", "revoke", "alice"]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "expertgate: or name the key file with --file"
    assert run("--id", "alice", "--file", "keys.yaml").exit_code == 0


@pytest.mark.parametrize(("given", "days"), [("30d", 30), ("an instant", 2)])
def test_expiry(run, tmp_path, given, days):
    if given == "an instant":
        given = (datetime.now(UTC) + timedelta(days=days)).isoformat()
    assert run("--id", "a", "--expires", given, "--file", "k.yaml").exit_code == 0
    (entry,) = yaml.safe_load((tmp_path / "k.yaml").read_text())
    expires = datetime.fromisoformat(str(entry["expires"]))
    assert abs(expires - datetime.now(UTC) - timedelta(days=days)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("expires", "words"),
    [
        ("2999-01-01", "has no time zone; write 2999-01-01T00:00:00Z if UTC"),
        ("2001-01-01T00:00:00Z", "not in the future"),
        ("0d", "not in the future"),
        ("-1d", "neither a time span"),
        ("99999d", "neither a time span"),
        ("soon", "neither a time span"),
        ("9999-12-31T23:59:59-01:00", "is no time in UTC"),
    ],
)
def test_an_expiry_that_cannot_be_meant_makes_no_key(run, tmp_path, expires, words):
    result = run("--id", "a", "--expires", expires)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not (tmp_path / "keys.yaml").exists()


def test_groups_by_commas_make_no_key(run, tmp_path):
    result = run("--id", "a", "--group", "research,staff")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'research,staff' has a comma; repeat --group for each" in result.stderr
    assert not (tmp_path / "keys.yaml").exists()


def test_a_taken_id_keeps_its_key(run, tmp_path):
    secret = run("--id", "a").stdout.strip()
    result = run("--id", "a")
    assert isinstance(result.exception, KeysError)
    assert result.stdout == ""
    assert KeyStore(tmp_path / "keys.yaml").find(secret).key.id == "a"


def test_a_list_shows_every_key_and_no_secret(run, tmp_path):
    made = [
        run("--id", "alice", "--group", "staff", "--group", "research", "--expires", "30d"),
        run("--id", "bob"),
        run("--id", "carol"),
        run("--id", "portal", "--group", "research", "--may-assert"),
    ]
    rotated = call("rotate", "bob", "--grace", "7d")
    assert call("revoke", "carol").exit_code == 0
    shown = call("list")
    head, alice, bob, carol, portal = shown.stdout.splitlines()
    assert head.split() == ["ID", "STATE", "CREATED", "EXPIRES", "GROUPS"]
    assert alice.split()[:2] == ["alice", "active"]
    assert alice.endswith("  research, staff")
    assert "active, and its old secret until" in bob
    assert carol.split()[:2] == ["carol", "revoked"]
    assert portal.endswith("of its users: research")
    text = (tmp_path / "keys.yaml").read_text()
    for secret in (result.stdout.strip() for result in (*made, rotated)):
        assert secret not in shown.stdout + text
    assert not any(entry["sha256"] in shown.stdout for entry in yaml.safe_load(text))


def test_an_old_secret_is_shown_to_end_with_its_key(run, tmp_path):
    now = datetime.now(UTC).replace(microsecond=0)
    soon, later = ((now + timedelta(hours=n)).isoformat() for n in (1, 9))
    old = {"sha256": "b" * 64, "expires": later}  # as somebody wrote it by hand
    entry = {"id": "alice", "sha256": "a" * 64, "expires": soon, "previous": [old]}
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump([entry]))
    state = call("list").stdout.splitlines()[1].split("  ")[1]
    assert state == f"active, and its old secret until {soon.replace('+00:00', 'Z')}"


def test_an_empty_list(run, tmp_path):
    (tmp_path / "keys.yaml").write_text("")
    assert call("list").stdout.splitlines() == ["ID  STATE  CREATED  EXPIRES  GROUPS"]


def test_rotation_prints_the_new_secret_once(run, tmp_path):
    old = run("--id", "alice").stdout.strip()
    result = call("rotate", "alice")
    new = result.stdout.removesuffix("\n")
    store = KeyStore(tmp_path / "keys.yaml")
    assert store.find(new).key.id == store.find(old).key.id == "alice"
    (entry,) = yaml.safe_load((tmp_path / "keys.yaml").read_text())
    (previous,) = entry["previous"]
    ends = datetime.fromisoformat(str(previous["expires"]))
    assert abs(ends - datetime.now(UTC) - timedelta(hours=24)) < timedelta(minutes=1)


def test_a_key_that_cannot_be_printed_is_told(run, tmp_path, capsys, monkeypatch):
    """As into a file on a full disk: it is in force, and nobody has it."""
    for command in (["create", "--id", "alice"], ["rotate", "alice"]):
        with monkeypatch.context() as patched, Path("/dev/full").open("w") as full:
            patched.setattr(sys, "stdout", full)
            assert main(["keys", *command]) == 2
            with suppress(OSError):
                full.close()  # which tries once more
        (line,) = capsys.readouterr().err.splitlines()
        assert "No space left on device" in line
        assert "keys rotate alice --grace 0h" in line
    (entry,) = yaml.safe_load((tmp_path / "keys.yaml").read_text())
    assert entry["previous"]


@pytest.mark.parametrize("grace", ["24", "1y", "-1h", "", "1h30m"])
def test_a_grace_that_cannot_be_meant_changes_nothing(run, tmp_path, grace):
    run("--id", "alice")
    before = (tmp_path / "keys.yaml").read_text()
    result = call("rotate", "alice", "--grace", grace)
    assert result.exit_code == 2
    assert "no time span" in " ".join(result.stderr.split())
    assert (tmp_path / "keys.yaml").read_text() == before


def test_help_without_a_command_and_a_mistake_in_one_line(run, capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("Usage: ")
    assert main(["usage"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_broken_file_is_a_line_for_each_fault_and_status_2(run, tmp_path, capsys):
    (tmp_path / "keys.yaml").write_text("- id: a:b\n- id: c\n  sha256: short\n")
    assert main(["keys", "list"]) == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("expertgate: keys.yaml:1: [0].id: must not contain ':' or '/'")
    assert [line.split(" ")[1:3] for line in rest] == [
        ["keys.yaml:1:", "[0].sha256:"],
        ["keys.yaml:3:", "[1].sha256:"],
    ]


@pytest.mark.parametrize(
    "arguments", [("list",), ("rotate", "a"), ("revoke", "a"), ("expire", "a", "1d")]
)
def test_no_file_is_one_line(run, arguments):
    result = call(*arguments)
    assert isinstance(result.exception, KeysError)
    assert len(str(result.exception).splitlines()) == 1
