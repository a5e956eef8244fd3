"""What docs/identity.md shows does what it says."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from expertgate.server.cli import cli
from expertgate.server.config import Config
from expertgate.server.keys import parse_keys

PAGE = (Path(__file__).parents[2] / "docs" / "identity.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_every_command_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "expertgate"
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, (line, result.output)
    alice, portal = parse_keys((tmp_path / "keys.yaml").read_bytes(), tmp_path / "keys.yaml")
    assert (alice.id, alice.revoked is None, len(alice.previous)) == ("alice", False, 1)
    assert (portal.may_assert, portal.groups) == (True, {"research", "staff"})


def test_the_key_file_is_one(tmp_path):
    [entries] = [block for block in blocks("yaml") if block.startswith("- id")]
    assert [key.id for key in parse_keys(entries.encode(), tmp_path)] == ["alice"]


def test_the_configuration_is_one_and_its_defaults_are(tmp_path):
    [text] = [block for block in blocks("yaml") if "jwt:" in block]
    (tmp_path / "expertgate.yaml").write_text(text + "policies: policies\n")
    (issuer,) = Config.load(tmp_path / "expertgate.yaml").identity.jwt
    # What is shown beside a default is that default.
    whole = yaml.safe_load(text)
    for field in ("algorithms", "leeway_s", "user"):
        del whole["identity"]["jwt"][0][field]
    (tmp_path / "expertgate.yaml").write_text(yaml.safe_dump({**whole, "policies": "policies"}))
    (bare,) = Config.load(tmp_path / "expertgate.yaml").identity.jwt
    assert issuer == bare


@pytest.mark.parametrize("text", re.findall(r"`(identity: \{.*?\})`", PAGE))
def test_a_configuration_within_the_text(tmp_path, text):
    (tmp_path / "expertgate.yaml").write_text(f"{text}\npolicies: policies\n")
    assert Config.load(tmp_path / "expertgate.yaml").identity.anonymous
