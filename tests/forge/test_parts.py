"""A run that was cut off goes on with what it has."""

import pytest

from expertgate.forge.parts import Parts


def test_a_part_is_made_once_and_found_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"weight": len(made)}

    first = Parts(tmp_path / "parts").get("expert", make)
    again = Parts(tmp_path / "parts")
    assert again.get("expert", make) == first == {"weight": 1}
    assert again.seconds["expert"] >= 0


def test_a_part_that_failed_is_not_there(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Parts(tmp_path).get("expert", fail)
    assert Parts(tmp_path).get("expert", lambda: 5) == 5
