from datetime import UTC, datetime, timedelta

import pytest
import yaml
from click.testing import CliRunner

from expertgate.server.keys import KeysError, KeyStore
from expertgate.server.keys_command import keys


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(keys, ["create", *arguments])


def test_the_secret_is_all_there_is_on_stdout(run, tmp_path):
    result = run("--id", "alice", "--group", "research", "--group", "staff")
    assert result.exit_code == 0
    secret = result.stdout.removesuffix("\n")
    principal = KeyStore(tmp_path / "keys.yaml").principal_for(secret)
    assert (principal.id, principal.groups) == ("alice", {"research", "staff"})
    assert secret not in result.stderr
    assert "keys.yaml" in result.stderr


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
        ("2999-01-01", "has no time zone; add Z"),
        ("2001-01-01T00:00:00Z", "is past"),
        ("0d", "neither days"),
        ("-1d", "neither days"),
        ("99999d", "neither days"),
        ("soon", "neither days"),
    ],
)
def test_an_expiry_that_cannot_be_meant_makes_no_key(run, tmp_path, expires, words):
    result = run("--id", "a", "--expires", expires)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not (tmp_path / "keys.yaml").exists()


def test_a_taken_id_keeps_its_key(run, tmp_path):
    secret = run("--id", "a").stdout.strip()
    result = run("--id", "a")
    assert isinstance(result.exception, KeysError)
    assert result.stdout == ""
    assert KeyStore(tmp_path / "keys.yaml").principal_for(secret).id == "a"
