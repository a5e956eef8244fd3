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


README = (DEMO.parents[2] / "README.md").read_text()
[SECTION] = re.findall(r"^## The `experts` field\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_readmes_examples_answer_as_it_says(demo):
    here = re.search(r"http://127\.0\.0\.1:\d+", demo)[0]
    key = re.search(r"^# nurse: (\S+)$", demo, re.MULTILINE)[1]
    section = SECTION.replace("http://127.0.0.1:8000", here)
    [curl] = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    first = run(f"KEY={key}\n{curl}")
    [python] = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    known = {"KEY": key}
    exec(python, known)
    answers = (
        first["choices"][0]["message"]["content"],
        known["answer"].choices[0].message.content,
    )
    words = " ".join(section.split())
    assert f'The first answers "{answers[0]}", the second "{answers[1]}"' in words
    quoted = json.loads(re.search(r'`(\{"effective".*?\})`', words)[1])
    for expert, shown in quoted["usage"].items():
        # Processors round bfloat16 products apart, by less than a hundredth of a share here.
        share = pytest.approx(first["experts"]["usage"][expert].pop("share"), abs=0.01)
        assert shown.pop("share") == share
    assert quoted == first["experts"]
