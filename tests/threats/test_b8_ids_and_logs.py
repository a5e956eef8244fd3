"""A client's request id reaches logs and aborts in vLLM; here ids are the server's."""

import uuid

import pytest

FORGED = "INFO admin logged in"


def test_a_header_is_given_back_and_never_taken_for_the_answers_id(server):
    mine = f"x{uuid.uuid4().hex}"
    for ask in server.asks:
        response = ask("alice", headers={"X-Request-Id": mine})
        assert response.status_code == 200
        assert mine not in response.text
        assert response.headers["x-request-id"] == mine
    assert f"[{mine}]" in server.log


@pytest.mark.parametrize("header", ["a b", "a;b", "x" * 129, "a\tb"])
def test_a_header_that_is_no_id_is_refused(server, header):
    for ask in server.asks:
        response = ask("alice", headers={"X-Request-Id": header})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "X-Request-Id"
    assert header not in server.log


@pytest.mark.parametrize("text", [f"a\n{FORGED}", f"a\r\n{FORGED}"])
def test_a_newline_writes_no_line_of_its_own(server, text):
    assert server.chat("alice", request_id=text).status_code == 400
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "user": text}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert server.chat("alice", **{text: 1}).status_code == 400
    assert server.chat("alice", model=text).status_code in (400, 404)
    assert server.chat("alice", experts=[text]).status_code in (400, 403)
    assert server.get("/v1/experts", "alice", **{"X-Purpose": "a b"}).status_code == 200
    for schema in ({"$ref": text}, {"$ref": f"#{text}"}, {"$ref": f"#/{text}"}):  # to xgrammar
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        assert server.chat("alice", response_format=form).status_code == 400
    assert not any(line.startswith(FORGED) for line in server.log.splitlines())


def test_two_requests_of_one_id_have_two(server):
    same = {"X-Request-Id": "same"}
    ids = {ask("alice", headers=same).json()["id"] for ask in server.asks for _ in range(2)}
    assert len(ids) == 2 * len(server.asks)


def test_headers_that_steer_vllm_are_not_read(server):
    for headers in (
        {"X-Vllm-Priority": "-100"},
        {"X-data-parallel-rank": "7"},
        {"X-Session-ID": "theirs"},
        {"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01"},
    ):
        assert server.chat("alice", headers=headers).status_code == 200
