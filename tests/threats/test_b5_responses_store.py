"""vLLM's store of responses asks no owner, and would bring a wide set's text into a narrow one."""

import pytest

from expertgate.server.refusals import SettingError, refuse_process


def test_nothing_is_stored_and_so_nothing_can_be_read_or_cancelled(server):
    found = server.respond("alice", store=True).json()
    assert found["id"].startswith("resp_")
    for user in ("alice", "bob"):
        assert server.get(f"/v1/responses/{found['id']}", user).status_code == 404
        assert server.post(f"/v1/responses/{found['id']}/cancel", {}, user).status_code == 404
        for stream in (False, True):
            again = server.respond(user, previous_response_id=found["id"], stream=stream)
            assert again.status_code == 404
            assert again.json()["error"]["param"] == "previous_response_id"


def test_one_cannot_run_in_the_background(server):
    for store in (True, None):
        response = server.respond("alice", background=True, store=store)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "background"


def test_a_client_cannot_choose_its_id(server):
    response = server.respond("alice", request_id="resp_of_somebody_else")
    assert response.status_code == 400


@pytest.mark.parametrize(
    "name", ["VLLM_ENABLE_RESPONSES_API_STORE", "VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT"]
)
def test_the_environment_cannot_turn_it_on(name):
    with pytest.raises(SettingError, match=name):
        refuse_process({name: "1"})
    refuse_process({name: "0"})
