"""Spans of a request, as an exporter gets them."""

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from expertgate.server import tracing
from expertgate.server.app import create_app
from tests.server.test_app import BODY, failed, script, service, stream

__all__ = ["script", "service"]

exporter = InMemorySpanExporter()


@pytest.fixture(scope="module", autouse=True)
def provider():
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "_tracer", None)
        tracing.send_to(made)  # OpenTelemetry takes one in a process; nobody else here sets one
        yield made


@pytest.fixture
def ask(service):
    exporter.clear()
    client = TestClient(create_app(service), raise_server_exceptions=False)

    def post(headers=(), **body):
        return client.post(
            "/v1/chat/completions",
            json={**BODY, **body},
            headers={"user": "alice", **dict(headers)},
        )

    return post


def spans():
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_is_a_span_with_its_parts_and_the_experts_that_speak(ask, script, streamed):
    event = 'data: {"choices":[{"index":0,"text":"a","finish_reason":"stop"}]}\n\n'
    script.result = stream(event, "data: [DONE]\n\n") if streamed else failed(400)
    parent = f"00-{'1' * 32}-{'2' * 16}-01"
    ask({"traceparent": parent}, stream=streamed)
    found = spans()
    assert set(found) == {"POST /v1/chat/completions", "identity", "policy", "audit", "engine"}
    whole = found.pop("POST /v1/chat/completions")
    assert whole.parent.span_id == int("2" * 16, 16)
    assert whole.attributes["http.response.status_code"] == (200 if streamed else 400)
    for part in found.values():
        assert part.parent.span_id == whole.context.span_id
        assert part.context.trace_id == int("1" * 32, 16)
        assert whole.start_time <= part.start_time <= part.end_time <= whole.end_time
    assert found["engine"].attributes[tracing.EXPERTS] == ("public", "expert-2")


def test_no_span_tells_what_was_asked_or_by_whom(ask, script):
    script.result = failed(400)
    ask({"Authorization": "Bearer eg-secret"}, model="toy")
    text = "".join(span.to_json() for span in exporter.get_finished_spans())
    for secret in ("eg-secret", "alice", '"hi"'):
        assert secret not in text


@pytest.mark.parametrize(
    ("environment", "sends"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9"}, True),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            },
            True,
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
            False,
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
            False,
        ),
    ],
)
def test_the_standard_variables_decide(monkeypatch, environment, sends):
    monkeypatch.setattr(trace, "set_tracer_provider", lambda provider: None)
    monkeypatch.setattr(tracing, "_tracer", None)
    provider = tracing.set_up({**environment, "OTEL_SERVICE_NAME": "gate"})
    assert (provider is not None) == sends
    if provider is not None:
        assert provider.resource.attributes["service.name"] == "gate"
        provider.shutdown()


def test_without_an_exporter_there_are_no_spans(ask, script, monkeypatch):
    monkeypatch.setattr(tracing, "_tracer", None)
    script.result = failed(400)
    assert ask({"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}).status_code == 400
    assert spans() == {}
