"""OpenTelemetry, by its standard variables: no spans leave where no endpoint is named.

A request is a span; in it are `identity`, `policy`, `audit` and `engine`, the last with the experts
that spoke.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Tracer

import expertgate

EXPERTS = "expertgate.experts"
"""The attribute of a span that names those that may speak."""

_tracer: Tracer | None = None
"""None while no spans leave: OpenTelemetry's own tracer that does nothing takes its time for it."""
_NOTHING = nullcontext(INVALID_SPAN)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def span(
    name: str, above: Context | None = None, kind: SpanKind = SpanKind.INTERNAL
) -> AbstractContextManager[Span]:
    """A span of what runs inside, below the one around it unless `above` is given."""
    return _NOTHING if _tracer is None else _tracer.start_as_current_span(name, above, kind)


def begin(name: str, attributes: Mapping[str, str | Sequence[str]]) -> Span:
    """A span that whoever called ends."""
    return INVALID_SPAN if _tracer is None else _tracer.start_span(name, attributes=attributes)


def context_in(headers: Mapping[str, str]) -> Context | None:
    """Whose span the client says that its request is in."""
    return None if _tracer is None else propagate.extract(headers)


def send_to(provider: TracerProvider) -> None:
    """From now on spans go there. Once in a process."""
    global _tracer
    trace.set_tracer_provider(provider)
    _tracer = provider.get_tracer("expertgate", expertgate.__version__)


def set_up(environment: Mapping[str, str] = os.environ) -> TracerProvider | None:
    """Sends spans where the environment says; shut the provider down to send the last of them."""
    off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp")
    if off or exporter == "none" or not _first(environment, _ENDPOINTS):
        return None
    grpc = _first(environment, _PROTOCOLS) == "grpc"
    sender: SpanExporter = GrpcExporter() if grpc else HttpExporter()
    name = environment.get("OTEL_SERVICE_NAME", "expertgate")
    resource = Resource.create({SERVICE_NAME: name})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(sender))
    send_to(provider)
    return provider


def _first(environment: Mapping[str, str], names: Sequence[str]) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")
