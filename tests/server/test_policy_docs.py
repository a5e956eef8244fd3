"""The examples of docs/policy.md do what the page says."""

import json
import re
from pathlib import Path

import pytest

from expertgate.server.cli import main
from tests.server.running import EXPERTS

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
CATALOGUE = [
    *EXPERTS,
    {"index": 4, "name": "ward", "owner": "clinic", "license": "closed", "tags": ["clinical"]},
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


POLICIES = {re.search('@id\\("(.*?)"', rule)[1]: rule for block in blocks("cedar")
            for rule in re.split(r"\n\n(?=@id)", block)}  # fmt: skip
(CLAIMS, CASES) = blocks("yaml")
COMMANDS = [line.partition("#")[0].split() for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "experts.json").write_text(json.dumps({"version": 1, "experts": CATALOGUE}))
    (tmp_path / "expertgate.yaml").write_text(
        f"identity: {{api_keys: keys.yaml}}\npolicies: policies\ncatalogue: experts.json\n{CLAIMS}"
    )
    (tmp_path / "cases.yaml").write_text(CASES)
    (tmp_path / "policies").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    try:
        return main(list(arguments)) or 0
    except SystemExit as stop:
        return stop.code


NOON = "time: 2026-11-24T12:00:00Z"
EVERYTHING = "permit(principal, action, resource);\n"
ALL = "public, math, news, code, ward"
CARE = "claims: {department: care, on_call: true}"
EXPECTED = {
    "researchers-may-consult-what-acme-lends": [
        ("groups: [research]", "math"),
        ("groups: [staff]", ""),
    ],
    "public-for-all": [("groups: []", "public")],
    "alice-and-the-news": [("groups: [alice]", "math, news")],
    "staff-may-use-what-is-open": [("groups: [staff]", "public"), ("groups: []", "")],
    "the-courier-is-not-for-advertising": [
        ("purpose: advertising", "public, math, code, ward"),
        ("groups: []", "public, math, code, ward"),
        ("purpose: study", ALL),
    ],
    "interns-by-day": [
        (f"groups: [interns], {NOON}", ALL),
        ("groups: [interns], time: 2026-11-24T18:00:00Z", ""),
        ("groups: [interns], time: 2026-11-24T07:59:59Z", ""),
        ("groups: [interns], time: 2026-11-22T12:00:00Z", ""),
    ],
    "acme-until-its-contract-ends": [
        (NOON, ALL),
        ("time: 2027-07-01T00:00:00Z", "public, news, code, ward"),
    ],
    "closed-experts-in-house": [
        ("address: 10.1.2.3", ALL),
        ("address: 192.168.1.1", "public"),
        ("groups: []", "public"),
    ],
    "clinicians-on-call": [
        (CARE, "ward"),
        ("claims: {department: care}", ""),
        ("claims: {department: law, on_call: true}", ""),
    ],
    "one-project": [
        ("claims: {projects: [apollo, x]}", "code"),
        ("claims: {projects: [x]}", ""),
    ],
}


def test_every_example_is_expected_to_do_something():
    assert POLICIES.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example(folder, capsys, name):
    rule = POLICIES[name]
    base = EVERYTHING if "forbid" in rule else ""
    (folder / "policies" / "all.cedar").write_text(base + rule)
    user = "alice" if "alice" in rule else "dave"
    table = "".join(f"- {{principal: {user}, {a}, granted: [{g}]}}\n" for a, g in EXPECTED[name])
    (folder / "cases.yaml").write_text(table)
    assert run("policy", "test", "cases.yaml") == 0, capsys.readouterr()


def test_the_commands_and_the_table(folder, capsys):
    rules = ("researchers-may-consult-what-acme-lends", "public-for-all", "interns-by-day")
    (folder / "policies" / "all.cedar").write_text("".join(POLICIES[rule] for rule in rules))
    (folder / "new").mkdir()
    (folder / "new" / "all.cedar").write_text(EVERYTHING)
    statuses = {tuple(c[1:3]): run(*c[1:]) for c in COMMANDS if c}
    assert statuses == {
        ("policy", "check"): 0,
        ("policy", "test"): 0,
        ("policy", "explain"): 0,
        ("policy", "diff"): 3,
        ("experts", "suspend"): 0,
        ("experts", "resume"): 0,
    }, capsys.readouterr()
    assert (folder / "suspended.yaml").read_text() == "[]\n"
