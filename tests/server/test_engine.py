from pathlib import Path

import pytest

from expertgate.server import engine
from expertgate.server.grants import Grants
from expertgate.server.refusals import SettingError


@pytest.fixture
def given(monkeypatch):
    """What vLLM is given; the start ends there."""
    seen = {}

    class Arguments:
        def __init__(self, **arguments):
            seen.update(arguments)
            raise ValueError("as far as this goes")

    monkeypatch.setattr(engine, "AsyncEngineArgs", Arguments)

    def start(**arguments):
        with pytest.raises(SettingError, match="as far as this goes"):
            engine.start(Path("/checkpoint"), "name", arguments, Grants())
        return seen

    return start


def test_the_queue_has_a_bound_unless_another_is_set(given):
    assert given()["max_num_queued_reqs"] == 1024
    assert given(max_num_queued_reqs=8)["max_num_queued_reqs"] == 8


def test_the_first_request_does_not_choose_how_schemas_are_compiled(given):
    assert given()["structured_outputs_config"] == {"backend": "xgrammar"}
