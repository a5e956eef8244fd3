"""OpenTelemetry, by its standard variables: no spans leave where no endpoint is named.

A request is a span; in it are `identity`, `policy`, `audit` and `engine`, the last with the experts
that spoke.
"""

import os
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

import expertgate

EXPERTS = "expertgate.experts"
"""The attribute of a span that names those that may speak."""

tracer = trace.get_tracer("expertgate", expertgate.__version__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


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
    trace.set_tracer_provider(provider)
    return provider


def _first(environment: Mapping[str, str], names: Sequence[str]) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")
