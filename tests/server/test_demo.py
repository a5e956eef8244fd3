"""`expertgate demo` as a person meets it: three keys, three `curl` lines, three answers."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.server.running import Server, environment, stop
from tests.support.demo import DEMO


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The running demo, on a machine without a C++ compiler, and what it printed until ready."""
    folder = tmp_path_factory.mktemp("demo")
    process = subprocess.Popen(
        [sys.executable, "-m", "expertgate.server.cli", "demo", "--port", "0"],
        env={**environment(), "CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("Stop with"):
            break
    server = Server(folder, "", process)
    try:
        yield "".join(printed)
    finally:
        stop(server)
        assert process.wait(60) == 0
        process.stdout.close()


def commands(printed):
    """User → the line to paste."""
    return dict(re.findall(r"^# (\w+): \S+\n(curl .*)$", printed, re.MULTILINE))


def run(command):
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_three_users_get_three_answers_to_one_question(demo):
    lines = commands(demo)
    assert set(lines) == {"nurse", "lawyer", "engineer"}
    answers = {user: run(line) for user, line in lines.items()}
    said = {user: a["choices"][0]["message"]["content"] for user, a in answers.items()}
    used = {user: tuple(a["experts"]["effective"]) for user, a in answers.items()}
    assert len(set(used.values())) == 3
    joint = json.loads((DEMO.parent / "questions.json").read_text())["joint"]
    assert all(json.dumps(joint["question"])[1:-1] in line for line in lines.values())
    experts = {"nurse": "formulary", "lawyer": "cases", "engineer": "api"}
    for user, expert in experts.items():
        # What else a user may consult has nothing to say to this question.
        assert said[user] == joint["answers"][f"public+{expert}"]
    assert len(set(said.values())) == 3


def test_the_keys_are_new_each_time_and_on_no_other_line(demo):
    keys = re.findall(r"eg-[\w-]{43}", demo)
    assert len(set(keys)) == 3
    assert len(keys) == 6  # once by name, once in the command
