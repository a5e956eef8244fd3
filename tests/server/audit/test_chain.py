"""How a record is written: in the one way that RFC 8785 knows, whoever writes it."""

import json

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from expertgate.server.audit.chain import check_canonical, line_of

NUMBERS = st.integers(-(2**60), 2**60) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def written(write, record):
    """The bytes, or that there is no way to write it."""
    try:
        return write(record)
    except ValueError:
        return None


@given(st.dictionaries(st.text(), VALUES, max_size=6))
@example({"share": 1.0, "tokens": 2048.0, "small": 1e-05, "smaller": 1e-07, "large": 1e15})
@example({"zero": -0.0, "limit": 0.0001, "more": 123456789012345.6, "huge": 1e22})
@example({"int": 2**53, "on": True, "off": False, "none": None})
@example({"int": 2**53 - 1, "least": -(2**53) + 1})
@example({"\ufb33": 1, "\U0001f600": 2})  # sorted by UTF-16, the other way round
@example({"a": "\ud800"})
@example({"a": '\x00\x08\x1f\x7f\u2028"\\/é'})
def test_every_record_is_written_as_the_library_writes_it(record):
    assert written(line_of, record) == written(rfc8785.dumps, record)


@pytest.mark.parametrize("record", [{1: 2}, {"a": {None: 1}}, {"a": {1, 2}}, {"a": b"x"}])
def test_what_is_no_json_is_not_made_json(record):
    with pytest.raises(ValueError, match=r"."):
        line_of(record)


def test_what_was_written_is_canonical():
    record = {"usage": {"share": 0.25, "tokens": 12.0}, "prev": "é"}
    check_canonical(json.loads(line_of(record)), line_of(record))
