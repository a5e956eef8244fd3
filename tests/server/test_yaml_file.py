import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from expertgate.server.yaml_file import YamlError, YamlFile

PATH = Path("a.yaml")


def test_values_and_their_lines():
    file = YamlFile.parse(b"a: 1\nb:\n  - x: 'yes'\n  - 2027-01-01\n", PATH)
    assert file.value == {"a": 1, "b": [{"x": "yes"}, "2027-01-01"]}
    assert file.lines["b", 0, "x"] == 3
    assert file.lines["b", 1] == 4
    assert str(file.fault(("b", 0, "y", "z"), "is missing")) == "a.yaml:3: b[0].y.z: is missing"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"a: [1\nb: 2\n", "a.yaml:2: "),
        (b"a: 1\n b: 2\n", "a.yaml:2: "),
        (b"a: 1\nb: 2\na: 3\n", "a.yaml:3: a: is given twice"),
        (b"a:\n  b: 1\n  b: 1\n", "a.yaml:3: b: is given twice"),
        (b"1: a\n", "a.yaml:1: the key '1' is not text; quote it"),
        (b"on: a\n", "a.yaml:1: the key 'on' is not text; quote it"),  # YAML 1.1 makes it true
        (b"? [a]\n: b\n", "a.yaml:1: the key is not text"),
        (b"<<: {a: 1}\n", "a.yaml:1: the key '<<' is not text"),
        (b"a: &x 1\nb: *x\n", "a.yaml:2: aliases are not read"),
        (b"a: &x [*x]\n", "a.yaml:1: aliases are not read"),
        (b"[" * 100_000, "a.yaml:1: is nested more than 32 deep"),
        (b"a: !!python/object/apply:os.system [id]\nb: !!python/name:os.system\n", "a.yaml:"),
        (b"a: !!bool maybe\n", "a.yaml:1: 'maybe' can't be read as a bool"),
        (b"a:\n  !!int ''\n", "a.yaml:2: '' can't be read as an int"),
        (b"a: !!float x\n", "a.yaml:1: 'x' can't be read as a float"),
        (b"a: !!binary aGk=\n", "a.yaml:1: the tag !!binary can't be read here"),
        (b"!!str [a]: b\n", "a.yaml:1: the key is not text"),
        (b"!!str {a: b}: c\n", "a.yaml:1: the key is not text"),
        (b"a: 1\n---\nb: 2\n", "a.yaml:2: but found another document"),
        ("ä: ö\nb:\n\tc: 1\n".encode(), "a.yaml:3: a tab can't stand here; indent with blanks"),
        (b"a:\n  - b\n\t- c\n", "a.yaml:3: found a tab character that violates indentation"),
        ("\ufeffa: %b\n".encode(), "a.yaml:1: '%' can't stand here"),
        (b"a: @b\n", "a.yaml:1: '@' can't stand here; quote the text that it begins"),
        (b"a:\n  *: b\n", "a.yaml:2: text that begins with * or & must be quoted"),
        (b"a: &\n", "a.yaml:1: text that begins with * or & must be quoted"),
        (b"a: \xff\n", "a.yaml: is not UTF-8"),
        (b"a: \x00\n", "a.yaml: "),
        (b"a: " + b"9" * 5_000, "a.yaml:1: "),
        (b" " * (1 << 21), "a.yaml: has 2097152 bytes; at most 1048576"),
    ],
)
def test_a_fault_has_its_line(raw, words):
    with pytest.raises(YamlError) as error:
        YamlFile.parse(raw, PATH)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


def test_faults_come_in_the_order_of_the_file():
    class Kind(BaseModel, extra="forbid"):
        first: int
        last: int
        missing: int

    file = YamlFile.parse(b"fist: 1\nlast: [1]\nfirst: [1]\n", PATH)
    with pytest.raises(YamlError) as raised:
        file.validate(Kind)
    places = [line.split(": ")[:2] for line in str(raised.value).splitlines()]
    assert places == [
        ["a.yaml:1", "missing"],
        ["a.yaml:1", "fist"],
        ["a.yaml:2", "last"],
        ["a.yaml:3", "first"],
    ]


def test_aliases_that_would_multiply_are_refused_at_the_first():
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
    )
    with pytest.raises(YamlError, match="aliases are not read"):
        YamlFile.parse(bomb.encode(), PATH)


_TAGS = ["!!str", "!!int", "!!bool", "!!float", "!!null", "!!binary", "!!timestamp", "!!set", "!x"]
_PARTS = [*_TAGS, "!!map", "!!seq", *"a1.-:_[]{}?,\n", "''", "0x"]
_TAGGED = st.lists(st.sampled_from(_PARTS), max_size=12).map(" ".join)


@given(
    st.binary(max_size=60)
    | _TAGGED.map(str.encode)
    | st.text("ab:-[]{},'\"&*!|>?#%@ \n\t1", max_size=60).map(str.encode)
)
def test_any_bytes_are_read_or_refused(raw):
    with contextlib.suppress(YamlError):
        assert YamlFile.parse(raw, PATH).lines[()] >= 1
