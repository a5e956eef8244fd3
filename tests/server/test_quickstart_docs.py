"""docs/quickstart.md leads where it says: all but what needs a server is done as it stands."""

import json
import re
from pathlib import Path

import pytest

from expertgate.server.config import Config
from expertgate.server.demo import _ENGINE
from expertgate.server.keys import parse_keys
from tests.support.documents import ROOT, run

PAGE = (ROOT / "docs" / "quickstart.md").read_text()
BLOCKS = re.findall(r"(?:<!-- (.*?) -->\n)?^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """The folder that it makes, and what was printed on the way."""
    here = tmp_path_factory.mktemp("quickstart")
    (here / "expertgate").symlink_to(ROOT / "expertgate")
    done = run("".join(text for note, text in BLOCKS if not note), here)
    assert done.returncode == 0, done.stderr
    return here / "gate", done.stdout


def test_what_is_not_run_says_why():
    notes = [note for note, _ in BLOCKS if note]
    assert len(notes) < len(BLOCKS)
    assert all(re.match(r"not run: \w", note) for note in notes)


def test_the_configuration_fits_the_demos_model(gate):
    folder, _ = gate
    config = Config.load(folder / "expertgate.yaml")
    assert (Path(config.model) / "config.json").exists()
    assert config.engine == _ENGINE


def test_keys_are_made_for_nobody_else_to_read(gate):
    folder, _ = gate
    ada, bob = parse_keys((folder / "keys.yaml").read_bytes(), folder / "keys.yaml")
    assert (ada.id, ada.groups, bob.id, bob.groups) == ("ada", {"clinical"}, "bob", set())
    for name in ("keys.yaml", "ada.key", "bob.key"):
        assert (folder / name).stat().st_mode & 0o077 == 0


def test_the_policies_grant_what_the_questions_rest_on(gate):
    _, printed = gate
    granted = re.findall(r"^(\w+) +allowed", printed, re.MULTILINE)
    assert granted == ["public", "formulary"]
    assert re.findall(r'\\"experts\\": \[\\"(\w+)\\"\]', PAGE) == granted


def test_the_question_is_one_whose_answer_the_formulary_alone_has():
    [messages] = re.findall(r"^QUESTION='(.*)'$", PAGE, re.MULTILINE)
    [message] = json.loads(f"{{{messages}}}")["messages"]
    questions = json.loads((ROOT / "expertgate" / "demo" / "questions.json").read_text())
    [known] = [one for one in questions["single"] if one["question"] == message["content"]]
    assert known["domain"] == "formulary"
    assert known["with"] == known["expected"] != known["without"]
