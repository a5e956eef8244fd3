"""What is one slip away from a name, and what isn't."""

import pytest

from expertgate.server.slips import slip


@pytest.mark.parametrize(
    "name",
    [
        "X-Purpse",
        "x-purposes",
        "X-Purpoze",
        "X-Puprose",
        "X-Prupose",
        "-Purpose",
        "X-Purpos",
        "X_PURPOSE",
    ],
)
def test_a_letter_is_wrong(name):
    assert slip("X-Purpose", ["Host", name, "Accept"]) == name


@pytest.mark.parametrize(
    "name",
    [
        "X-Purpose",  # is the name
        "x-purpose",
        "Purpose",  # browsers send these two of pages that they fetch ahead
        "Sec-Purpose",
        "X-Prpse",
        "X-Pur",
        "X-Puporse",
        "X",
        "",
    ],
)
def test_it_is_that_name_or_quite_another(name):
    assert slip("X-Purpose", [name]) is None
