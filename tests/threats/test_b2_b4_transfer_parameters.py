"""Transfer parameters name hosts and blocks (b2), and replace the prompt itself (b4)."""

import pytest


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_transfer_params": {"prompt_token_ids": [72, 105]}},
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "127.0.0.1"}},
        {"kv_transfer_params": None},
        {"ec_transfer_params": {}},
    ],
    ids=str,
)
def test_they_are_refused(server, fields):
    for ask in server.asks:
        response = ask("alice", **fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] in fields


def test_the_model_sees_the_messages(server):
    def asked(content):
        body = {"messages": [{"role": "user", "content": content}], "return_token_ids": True}
        return server.chat("alice", **body).json()["prompt_token_ids"]

    short, long = asked("a"), asked("a" * 50)
    assert len(long) - len(short) == 49
