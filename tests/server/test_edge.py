"""Ids of requests, and their lines in the log."""

import json
import logging
import re

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.testclient import TestClient

from expertgate.server.app import show_errors
from expertgate.server.logs import _JSON, _TEXT, request_id
from expertgate.server.metrics import DENIALS


@pytest.fixture
def client():
    app = FastAPI()

    async def look(request: Request):
        request.state.facts["principal"] = "alice"
        return JSONResponse({"id": request_id.get()})

    async def fail():
        raise RuntimeError("at /home/secret")

    app.add_api_route("/look", look)
    app.add_api_route("/fail", fail)
    show_errors(app)
    return TestClient(app, raise_server_exceptions=False)


def test_a_request_brings_its_id(client):
    for given in ("a", "x" * 128, "3f2c:1/b+c=._-"):
        response = client.get("/look", headers={"X-Request-Id": given})
        assert response.headers["x-request-id"] == response.json()["id"] == given


def test_a_request_without_one_is_given_one(client):
    ids = {client.get("/look").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(len(one) == 32 for one in ids)


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "é", "a\x85b", "a;b", "<a>"])
def test_an_id_that_could_forge_a_line_is_refused(client, given, caplog):
    caplog.set_level(logging.INFO, "expertgate.access")
    response = client.get("/look", headers={"X-Request-Id": given.encode("latin-1")})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "X-Request-Id")
    assert response.headers["x-request-id"] != given
    (record,) = caplog.records
    assert record.getMessage() == "GET /look"
    assert record.facts["code"] == "invalid_request"
    assert given not in map(str, record.facts.values())


def test_two_ids_are_refused(client):
    headers = [("X-Request-Id", "a"), ("X-Request-Id", "b")]
    denials = DENIALS.labels("invalid_request")._value
    before = denials.get()
    response = client.get("/look", headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("X-Request-Id must be sent once")
    assert denials.get() == before + 1


@pytest.mark.parametrize(("path", "status"), [("/look", 200), ("/fail", 500), ("/none", 404)])
def test_each_request_has_one_line(client, caplog, path, status):
    caplog.set_level(logging.INFO, "expertgate.access")
    response = client.get(path, headers={"X-Request-Id": "mine"})
    assert response.status_code == status
    assert response.headers["x-request-id"] == "mine"
    (record,) = [r for r in caplog.records if r.name == "expertgate.access"]
    assert record.getMessage() == f"GET {path}"
    assert record.facts["status"] == status
    assert record.facts["took_ms"] >= 0
    assert record.facts.get("principal") == ("alice" if status == 200 else None)
    code = None if status == 200 else response.json()["error"]["code"]
    assert record.facts.get("code") == code


def test_a_path_keeps_to_its_line(client, caplog):
    caplog.set_level(logging.INFO, "expertgate.access")
    client.get("/a%0aINFO%20admin%20logged%20in" + "x" * 1000)
    (record,) = caplog.records
    record.request_id = "-"
    assert "\n" not in _TEXT.format(record)
    assert len(record.getMessage()) < 300


def test_no_path_says_what_the_line_says_of_a_request(client, caplog):
    caplog.set_level(logging.INFO, "expertgate.access")
    client.get("/none%20status=200%20principal=alice%20experts=news")
    (record,) = caplog.records
    record.request_id = "-"
    assert re.findall(r" (\w+)=", _TEXT.format(record)) == ["status", "took_ms", "code"]


def test_nor_does_a_name():
    """A gateway's users, and an issuer's, may be called almost anything."""
    record = logging.makeLogRecord(
        {"name": "n", "levelname": "INFO", "levelno": 20, "msg": "hi", "request_id": "r1",
         "facts": {"principal": r"portal/a\ experts=public", "experts": "news"}}
    )  # fmt: skip
    assert _TEXT.format(record).endswith(r" principal=portal/a\\\x20experts=public experts=news")


def test_lines_as_text_and_as_json():
    record = logging.makeLogRecord(
        {"name": "n", "levelname": "INFO", "levelno": 20, "msg": "hi", "request_id": "r1",
         "facts": {"status": 200}, "created": 1795809710.0256, "msecs": 25.6,
         "vllm_process_name": "p"}
    )  # fmt: skip
    assert _TEXT.format(record).endswith("INFO n [r1] hi status=200")
    found = json.loads(_JSON.format(record))
    assert found["request_id"] == "r1"
    assert found["facts"] == {"status": 200}
    assert found["message"] == "hi"
    assert found["level"] == "INFO"
    assert found["time"] == "2026-11-27T20:01:50.025Z"
    assert found.keys() == {"time", "level", "logger", "message", "request_id", "facts"}
