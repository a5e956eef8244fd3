"""The application around handlers that do as they are told: errors, and the end of each grant."""

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest
from jinja2 import TemplateSyntaxError
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.exceptions import QueueOverflowError, VLLMNotFoundError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from expertgate.model.catalogue import Catalogue
from expertgate.policies.decision import Decision
from expertgate.policies.expert_set import ExpertSet
from expertgate.policies.principal import Principal
from expertgate.server.app import create_app
from expertgate.server.audit.trail import Trail
from expertgate.server.cache_salts import CacheSalts
from expertgate.server.grants import HANDLE_ARG, GrantError
from expertgate.server.guard import GuardedLLM, UnavailableError
from expertgate.server.handlers import Handlers
from expertgate.server.openapi.document import document
from expertgate.server.service import Service
from tests.server.fakes import FakeEngine

BODY = {"messages": [{"role": "user", "content": "hi"}]}


class Script:
    """Stands for both of vLLM's handlers."""

    def __init__(self):
        self.result = None
        self.seen = []
        self.service = None

    async def create_chat_completion(self, body):
        grant = self.service.grants.redeem(body.vllm_xargs[HANDLE_ARG])
        self.seen.append((grant.tenant, grant.experts.text, body))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    create_completion = create_chat_completion


@pytest.fixture
def script():
    return Script()


async def by_header(connection):
    return Principal(connection.headers["user"])


@pytest.fixture
def service(script):
    catalogue = Catalogue.default(3)
    made = Service(
        catalogue=catalogue,
        audit=Trail(None, catalogue),
        identity=SimpleNamespace(identify=by_header),
        policies=SimpleNamespace(
            decide=lambda principal, context: Decision(ExpertSet.of([0, 2]), {}, "v")
        ),
    )
    made.engine = GuardedLLM(FakeEngine(), made.grants, CacheSalts(b"w"))
    made.handlers = Handlers(script, script, script, script, "toy", 2048, 0)
    script.service = made
    return made


@pytest.fixture
def ask(service):
    client = TestClient(create_app(service), raise_server_exceptions=False)
    return lambda **body: client.post(
        "/v1/chat/completions", json={**BODY, **body}, headers={"user": "alice"}
    )


def error_of(response):
    return response.status_code, response.json()["error"]["code"]


async def stream(*chunks):
    for chunk in chunks:
        if isinstance(chunk, Exception):
            raise chunk
        yield chunk


def failed(code, kind="BadRequestError"):
    return ErrorResponse(error=ErrorInfo(message="as vLLM says it", type=kind, code=code))


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (VLLMValidationError("bad"), (400, "invalid_request")),
        (ValueError("bad"), (400, "invalid_request")),
        (TemplateSyntaxError("bad", 1), (400, "invalid_request")),
        (VLLMNotFoundError("none"), (404, "model_not_found")),
        (QueueOverflowError(), (429, "overloaded")),
        (EngineDeadError(), (503, "engine_unavailable")),
        (UnavailableError("dead"), (503, "engine_unavailable")),
        (EngineGenerateError(), (500, "internal_error")),
        (GrantError("none"), (500, "internal_error")),
        (RuntimeError("at /srv/secret"), (500, "internal_error")),
        (KeyError("secret"), (500, "internal_error")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_handler_raises(ask, script, service, raised, expected):
    script.result = raised
    response = ask()
    assert error_of(response) == expected
    assert "secret" not in response.text
    assert len(service.grants) == 0


@pytest.mark.parametrize("kind", [ValueError, TypeError, OverflowError])
def test_what_may_be_a_fault_of_ours_is_logged_with_its_place(ask, script, caplog, kind):
    script.result = kind("what the client said")
    assert error_of(ask()) == (400, "invalid_request")
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert kind.__name__ in record.getMessage()
    assert "in create_chat_completion" in record.getMessage()
    assert "what the client said" not in caplog.text


def test_the_line_of_a_refusal_says_who_was_refused_and_why(ask, caplog):
    caplog.set_level(logging.INFO, "expertgate.access")
    assert error_of(ask(experts=["expert-1"])) == (403, "expert_not_permitted")
    assert error_of(ask(expert=["public"])) == (400, "invalid_request")
    facts = [r.facts for r in caplog.records if r.name == "expertgate.access"]
    assert [(f["principal"], f["code"]) for f in facts] == [
        ("alice", "expert_not_permitted"),
        ("alice", "invalid_request"),
    ]


def test_what_vllm_says_is_the_clients_fault_is_not_logged(ask, script, caplog):
    script.result = VLLMValidationError("bad")
    assert error_of(ask()) == (400, "invalid_request")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (failed(400), (400, "invalid_request")),
        (failed(404), (404, "model_not_found")),
        (failed(500), (500, "internal_error")),
        (failed(503), (503, "engine_unavailable")),
        (failed(503, "Service Unavailable"), (429, "overloaded")),
    ],
)
def test_what_a_handler_returns(ask, script, service, returned, expected):
    script.result = returned
    response = ask()
    assert error_of(response) == expected
    assert len(service.grants) == 0
    # The same as the first event of a stream, before the status has gone out.
    script.result = stream(f"data: {returned.model_dump_json()}\n\n", "data: [DONE]\n\n")
    assert error_of(ask(stream=True)) == expected
    assert len(service.grants) == 0


def test_a_compressed_body_is_told_as_one(service):
    client = TestClient(create_app(service))
    for encoding, status in (("gzip", 415), ("br", 415), ("identity", 400)):
        headers = {"user": "alice", "Content-Type": "application/json"}
        headers["Content-Encoding"] = encoding
        found = client.post("/v1/completions", content=b"{}", headers=headers)
        assert found.status_code == status
        assert ("compressed" in found.text) == (status == 415)


def test_a_prompt_is_called_by_the_field_that_has_it(ask, script):
    for name in ("input_text", "input_tokens"):
        script.result = VLLMValidationError("too long", parameter=name)
        told = ask().json()["error"]
        assert (told["param"], told["message"]) == ("messages", "too long")
    script.result = VLLMValidationError("too (much)", parameter="temperature", value=[3])
    assert ask().json()["error"]["message"] == "too (much)"
    assert ask().json()["error"]["param"] == "temperature"
    told = {"message": "too long", "type": "BadRequestError", "code": 400, "param": "input_text"}
    script.result = stream(f"data: {json.dumps({'error': told})}\n\n", "data: [DONE]\n\n")
    assert ask(stream=True).json()["error"]["param"] == "messages"


def test_where_a_library_raised_it_is_no_part_of_an_error(ask, script):
    words = "no grammar: [12:01:59] /src/xgrammar/cpp/converter.cc:123: Unsatisfiable schema: 1:2\n"
    script.result = VLLMValidationError(words)
    assert ask().json()["error"]["message"] == "no grammar: Unsatisfiable schema: 1:2"


def test_too_many_requests_are_told_when_to_come_back(ask, script):
    script.result = QueueOverflowError()
    assert ask().headers["retry-after"] == "1"


def test_an_error_within_a_stream_has_our_shape_and_ends_the_grant(ask, script, service):
    first = 'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n'
    script.result = stream(first, f"data: {failed(503).model_dump_json()}\n\n", "data: [DONE]\n\n")
    lines = [line for line in ask(stream=True).text.splitlines() if line]
    assert json.loads(lines[1].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert lines[2] == "data: [DONE]"
    assert len(service.grants) == 0


def test_a_stream_that_breaks_ends_its_grant(ask, script, service):
    script.result = stream('data: {"choices":[]}\n\n', RuntimeError("at /srv/secret"))
    assert "secret" not in ask(stream=True).text
    assert len(service.grants) == 0


def test_the_handler_sees_ours_and_nothing_of_the_clients(ask, script):
    script.result = failed(400)
    ask(model="toy:public")
    ((tenant, experts, body),) = script.seen
    assert (tenant, experts) == ("alice", "0")
    assert body.model == "toy"
    assert list(body.vllm_xargs) == [HANDLE_ARG]
    assert len(body.request_id) == 32


def test_no_grant_is_issued_for_what_is_refused_before(ask, script, service):
    for body in ({"experts": ["expert-1"]}, {"expert": []}, {"model": "another"}, {"n": 100}):
        assert ask(**body).status_code in (400, 403, 404)
    assert script.seen == []
    assert len(service.grants) == 0


def test_starting_and_draining_answer_503(ask, service):
    service.engine.drain()
    assert error_of(ask()) == (503, "engine_unavailable")
    service.engine = None
    assert error_of(ask()) == (503, "engine_unavailable")


def test_health_and_ready_follow_the_engine(service):
    engine = FakeEngine()
    service.engine = GuardedLLM(engine, service.grants, CacheSalts(b"w"))
    client = TestClient(create_app(service))

    def statuses():
        return client.get("/health").status_code, client.get("/ready").status_code

    assert statuses() == (200, 200)
    engine.errored = True
    assert statuses() == (503, 503)  # whoever watches should start another
    service.engine.drain()
    assert statuses() == (200, 503)
    service.engine = None
    assert statuses() == (200, 503)


def test_ready_says_why_it_is_not(service):
    client = TestClient(create_app(service))

    def why():
        return client.get("/ready").json().get("why")

    assert why() is None
    service.liveness = SimpleNamespace(late=True)
    assert why() == "the engine does not answer"
    service.unwatched = "the engine"
    assert why() == "the engine is no longer watched"
    service.engine.drain()
    assert why() == "the server is going down"
    service.engine = None
    assert why() == "the engine is starting"
    service.fault = "the engine failed its self-test: it did"
    assert why() == service.fault
    assert error_of(client.get("/v1/models", headers={"user": "alice"})) == (
        503,
        "engine_unavailable",
    )


def test_two_purposes_are_refused(service):
    client = TestClient(create_app(service))
    headers = [("user", "alice"), ("X-Purpose", "a"), ("X-Purpose", "b")]
    assert client.get("/v1/experts", headers=headers).status_code == 400


def test_a_header_that_is_almost_for_a_purpose_is_not_passed_over(service):
    """A policy that takes experts away by a purpose would never hear of it."""
    response = TestClient(create_app(service)).get(
        "/v1/experts", headers={"user": "alice", "X-Purpse": "advertising"}
    )
    assert error_of(response) == (400, "invalid_request")
    message = response.json()["error"]["message"]
    assert message == "there is no header x-purpse; did you mean X-Purpose?"


@pytest.mark.parametrize("purpose", ["", "x" * 257, "a\tb", "a\x85b", "\xe9"])
def test_a_purpose_fits_a_log_line(service, purpose):
    client = TestClient(create_app(service))
    headers = {"user": "alice", "X-Purpose": purpose.encode("latin-1")}
    response = client.get("/v1/experts", headers=headers)
    assert error_of(response) == (400, "invalid_request")
    assert client.get("/v1/experts", headers={**headers, "X-Purpose": "x" * 256}).is_success


def test_a_purpose_may_stand_in_header_or_body_and_reaches_the_policy(service):
    seen = []

    def decide(principal, context):
        seen.append((context.purpose, context.address))
        return Decision(ExpertSet(0), {}, "v")

    service.policies = SimpleNamespace(decide=decide)
    client = TestClient(create_app(service), client=("10.0.0.7", 5000))

    def ask(header, body):
        headers = {"user": "alice"} | ({} if header is None else {"X-Purpose": header})
        more = {} if body is None else {"purpose": body}
        return error_of(
            client.post("/v1/completions", json={"prompt": "a", **more}, headers=headers)
        )

    refused = (403, "expert_not_permitted")
    assert [ask(None, None), ask("care", None), ask(None, "care"), ask("care", "care")] == [
        refused
    ] * 4
    # Whatever headers of a proxy say, the address is the connection's.
    client.get("/v1/experts", headers={"user": "alice", "X-Forwarded-For": "1.2.3.4"})
    assert [purpose for purpose, _ in seen] == [None, "care", "care", "care", None]
    assert {str(address) for _, address in seen} == {"10.0.0.7"}
    for header, body in (("care", "ads"), (None, ""), (None, "\xe9"), ("care", "Care"), (None, 1)):
        assert ask(header, body) == (400, "invalid_request")
    assert len(seen) == 5


def test_there_are_no_pages_only_the_document(service, monkeypatch):
    client = TestClient(create_app(service))
    for path in ("/docs", "/docs/oauth2-redirect", "/redoc"):
        assert client.get(path).status_code == 404
    # Made into text once: it takes milliseconds, in which nobody else is served.
    monkeypatch.setattr(JSONResponse, "render", None)
    response = client.get("/openapi.json")
    assert (response.status_code, response.json()) == (200, document())
    assert response.headers["content-type"] == "application/json"


def test_a_line_feed_behind_a_route_is_another_path(service):
    """To a gateway in front of us, which lets some routes through, it is one already."""
    response = TestClient(create_app(service)).get("/health%0a")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_leaving_while_the_handler_works_ends_grant_and_handler(service, script):
    ended = []

    async def never(body):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    script.create_chat_completion = never
    messages = [
        {"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"user", b"alice"), (b"content-type", b"application/json")],
    }
    answering = create_app(service)(scope, receive, send)
    asyncio.run(asyncio.wait_for(answering, 20))
    assert ended == [True]
    assert len(service.grants) == 0
    assert sent[0]["status"] == 499


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),  # of a base URL without its /v1
        ("/models", "/v1/models"),
        ("/v1/v1/models", "/v1/models"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/tokenize", "/tokenize"),
        ("/healthz", "/health"),
        ("/v1/embeddings", None),
        ("/", None),
        ("/v1/experts" + "/" * 70, None),
    ],
)
def test_a_path_that_is_no_route_is_told_what_was_meant(service, path, meant):
    response = TestClient(create_app(service)).post(path)
    assert error_of(response) == (404, "not_found")
    hint = "" if meant is None else f"; did you mean {meant}?"
    assert response.json()["error"]["message"] == f"there is no route {path}{hint}"


def test_another_method_is_told_the_routes_own(service):
    response = TestClient(create_app(service)).get("/v1/chat/completions")
    assert error_of(response) == (405, "method_not_allowed")
    assert response.json()["error"]["message"] == "/v1/chat/completions takes POST, not GET"
    assert response.headers["Allow"] == "POST"
