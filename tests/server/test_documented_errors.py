"""Every error that the OpenAPI document names can be had: one request for each route and code."""

import http.client
import json
from concurrent.futures import Future
from contextlib import aclosing

import httpx
import jsonschema
import pytest
from vllm.exceptions import GenerationError
from vllm.v1.engine.exceptions import EngineDeadError

from expertgate.policies.principal import Principal
from expertgate.server import reading
from expertgate.server.admission import Admission
from expertgate.server.audit import receipts, writer
from expertgate.server.errors import CODES
from expertgate.server.openapi.document import document
from expertgate.server.routes.table import ROUTES
from tests.support import sse

DOCUMENT = document()
DOCUMENTED = [(route, code) for route in ROUTES for code in route.codes]
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/experts/explain": {},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [65]},
}


class Asking:
    """Asks one route; each method gets one error of it."""

    def __init__(self, server, issuer, route, monkeypatch):
        self.server, self.issuer, self.route, self.patch = server, issuer, route, monkeypatch
        self.service = server.service
        self.generates = route.event is not None

    def ask(self, headers=None, content=None, request_id="none", model=None, **fields):
        path = self.route.path.replace("{request_id}", request_id)
        path = path.replace("{model}", model or "toy")
        url = self.server.url + path
        sent = {**self.server.headers("dave"), **(headers or {})}
        if self.route.method == "POST":
            if model is not None:
                fields["model"] = model
            body = json.dumps({**BODIES[self.route.path], **fields}).encode()
            content = body if content is None else content
            sent.setdefault("Content-Type", "application/json")
        return httpx.request(self.route.method, url, content=content, headers=sent, timeout=60)

    def invalid_request(self):
        return self.ask({"X-Request-Id": "two words"})

    def invalid_credential(self):
        return self.ask({"Authorization": "Bearer eg-wrong"})

    def issuer_unavailable(self):
        self.issuer.answers = 500
        return self.ask({"Authorization": f"Bearer {self.issuer.token()}"})

    def request_timeout(self):
        self.patch.setattr(reading, "BODY_S", 0.01)
        waiting = http.client.HTTPConnection(self.server.url.removeprefix("http://"), timeout=60)
        waiting.putrequest(self.route.method, self.route.path)
        for name, value in self.server.headers().items():
            waiting.putheader(name, value)
        waiting.putheader("Content-Type", "application/json")
        waiting.putheader("Content-Length", "10")
        waiting.endheaders()  # and never a body
        found = waiting.getresponse()
        return httpx.Response(found.status, headers=found.getheaders(), content=found.read())

    def body_too_large(self):
        return self.ask(content=b"x" * (reading.MAX_BODY_BYTES + 1))

    def unsupported_media_type(self):
        return self.ask({"Content-Type": "text/plain"})

    def invalid_experts(self):
        fields = {"model": "toy:"} if "experts" not in self.fields else {"experts": "public"}
        return self.ask(**fields)

    def expert_not_permitted(self):
        if "experts" not in self.fields:
            return self.ask(model="toy:public+news")
        return self.ask(experts=["public", "news"])

    def expert_withdrawn(self):
        def withdraw():
            for grant in self.service.grants:
                grant.withdraw()

        self.patch.setattr(self.server.core, "instead", withdraw)
        return self.ask()

    def model_not_found(self):
        return self.ask(model="another")

    def not_found(self):
        return self.ask(**({"previous_response_id": "resp_1"} if self.generates else {}))

    def overloaded(self):
        full = Admission(places=1)
        full.enter(Principal("somebody"))
        self.patch.setattr(self.service, "admission", full)
        return self.ask()

    def internal_error(self):
        def fail(*_, **__):
            raise RuntimeError("as an engine breaks, at /srv/secret")

        if self.generates:
            self.patch.setattr(self.server.core, "instead", fail)
        else:
            tokens = type(self.service.handlers.tokens)
            for name in ("create_tokenize", "create_detokenize"):
                self.patch.setattr(tokens, name, fail)
        return self.ask()

    def engine_unavailable(self):
        self.patch.setattr(self.server.core.resources, "engine_dead", True)
        return self.ask()

    def audit_unavailable(self):
        if self.generates:
            self.patch.setattr(writer, "_MAX_WAITING", 0)
            return self.ask()
        self.patch.setattr(receipts, "_RESULT_WITHIN_S", 0.01)
        dave = Principal("dave", frozenset(), via="key")
        self.service.audit.receipts.keep("waits", dave, None, Future(), {})
        return self.ask(request_id="waits")

    @property
    def fields(self):
        return frozenset().union(*(kind.fields for kind in self.route.bodies))


@pytest.fixture
def asking(coreless, issuer, monkeypatch):
    yield lambda route: Asking(coreless, issuer, route, monkeypatch)
    issuer.answers = None


@pytest.mark.parametrize(
    ("route", "code"), DOCUMENTED, ids=lambda value: getattr(value, "path", value)
)
def test_a_documented_error_can_be_had(asking, route, code):
    response = getattr(asking(route), code)()
    status, _ = CODES[code]
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert "secret" not in response.text
    documented = DOCUMENT["paths"][route.path][route.method.lower()]["responses"][str(status)]
    for name, header in documented["headers"].items():
        assert name in response.headers or not header.get("required"), name
    assert "X-Request-Id" in response.headers
    schema = documented["content"]["application/json"]["schema"]
    whole = {**schema, "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(whole).validate(response.json())


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_of_some_route_or_of_none(code):
    anywhere = {code for _, code in DOCUMENTED}
    assert (code in anywhere) != (code == "method_not_allowed")


def test_health_and_ready_say_that_an_engine_is_dead(asking, coreless):
    for route in (route for route in ROUTES if route.more):
        assert asking(route).ask().status_code == 200
        response = asking(route).engine_unavailable()
        assert response.status_code == 503
        (schema,) = {schema for status, schema in route.more if status == 503}
        whole = {**DOCUMENT["components"]["schemas"][schema], "components": DOCUMENT["components"]}
        jsonschema.Draft202012Validator(whole).validate(response.json())
        coreless.core.resources.engine_dead = False


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineDeadError(), "engine_unavailable"),
        (GenerationError("at /srv/secret"), "internal_error"),
    ],
    ids=["dies", "fails"],
)
@pytest.mark.parametrize("outputs", [0, 2])
@pytest.mark.parametrize("route", [r for r in ROUTES if r.event], ids=lambda route: route.path)
def test_what_an_engine_dies_of_in_a_stream_is_the_servers_fault(
    asking, coreless, monkeypatch, route, outputs, error, code
):
    generate = coreless.llm.generate

    async def dying(*arguments, **named):
        async with aclosing(generate(*arguments, **named)) as found:
            for _ in range(outputs):
                yield await anext(found)
            raise error

    monkeypatch.setattr(coreless.llm, "generate", dying)
    response = asking(route).ask(stream=True)
    assert "secret" not in response.text
    if outputs == 0:
        told = response.json()["error"]["code"]
        assert (response.status_code, told) == (CODES[code][0], code)
        return
    told = [event for event in sse.data(response) if '"code":' in event.replace(" ", "")]
    found = json.loads(told[-1])
    assert found.get("error", found)["code"] == code
