"""What can't be recorded must not reach the engine, by any route that generates."""

import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from expertgate.server.app import create_app
from tests.server.audit.application import BODY, service_of
from tests.server.audit.logs import check, open_log, records
from tests.server.fakes import FakeEngine
from tests.support.waiting import until

GENERATE = {
    "/v1/chat/completions": BODY,
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
}
GENERATE_NOTHING = {"/v1/experts/explain", "/tokenize", "/detokenize"}


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def app(tmp_path, engine):
    log = open_log(tmp_path)
    service = service_of(log, engine)
    service.audit.start("toy", "v" * 64)
    yield create_app(service)
    log.close()
    assert check(tmp_path).faults == []


@pytest.fixture
def client(app):
    return TestClient(app)


def test_every_route_is_known_to_generate_or_not_to(app):
    posts = {r.path for r in app.routes if isinstance(r, APIRoute) and "POST" in r.methods}
    assert posts == GENERATE.keys() | GENERATE_NOTHING


def test_a_log_that_was_taken_away_stops_every_route(client, engine, tmp_path):
    def ask(path, **more):
        return client.post(path, json={**GENERATE[path], **more}, headers={"user": "alice"})

    assert ask("/v1/chat/completions").status_code == 200
    assert len(engine.calls) == 1
    until(lambda: any(record["kind"] == "result" for record in records(tmp_path)))
    (path,) = (tmp_path / "audit").glob("*.jsonl")
    aside = path.with_suffix(".aside")
    path.rename(aside)
    for route in GENERATE:
        for stream in (False, True):
            response = ask(route, stream=stream)
            assert response.status_code == 503, response.text
            assert response.json()["error"]["code"] == "audit_unavailable"
    assert len(engine.calls) == 1
    assert client.get("/ready").status_code == 503

    aside.rename(path)
    until(lambda: client.get("/ready").status_code == 200)
    assert ask("/v1/chat/completions").status_code == 200
    assert len(engine.calls) == 2
