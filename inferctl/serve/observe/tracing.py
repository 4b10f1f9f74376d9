"""OpenTelemetry spans of requests, recorded after the response, so that they do not delay it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from inferctl.core.errors import UsageError, install_hint
from inferctl.serve.edge.request_context import OTHER
from inferctl.tenancy.metering.usage_event import UsageEvent

_TO_NS = 1_000_000_000


def enabled(environment: Mapping[str, str]) -> bool:
    """Return whether OpenTelemetry's environment variables configure an endpoint for traces."""
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return any(environment.get(name) for name in names) and not disabled


def tracer(name: str, version: str) -> Callable[[UsageEvent], None]:
    """Return the function that records a span per event. The SDK reads its settings from OTEL_* variables.

    Raises `UsageError` if the packages are not installed.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    except ModuleNotFoundError as error:
        raise UsageError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT enables traces, but {error.name} is not installed",
            f"{install_hint('otel')}, or unset the variable",
        ) from None
    # Environment variables override these values, for example OTEL_SERVICE_NAME.
    provider = TracerProvider(resource=Resource.create({"service.name": "inferctl", "service.version": version}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    otel = provider.get_tracer("inferctl")
    propagator = TraceContextTextMapPropagator()

    def record(event: UsageEvent) -> None:
        if event.endpoint in ("", OTHER):  # not a request of a task
            return
        end = time.time_ns()
        start = end - int(event.seconds * _TO_NS)
        attributes = {
            "http.request.method": "POST",
            "http.route": f"/v1/{event.endpoint}",
            "http.response.status_code": event.status,
            "gen_ai.operation.name": event.endpoint,
            "gen_ai.request.model": event.model or name,
            "gen_ai.usage.input_tokens": event.input_tokens,
            "inferctl.request_id": event.request_id,
        }
        span = otel.start_span(
            event.endpoint,
            propagator.extract(event.trace),
            trace.SpanKind.SERVER,
            attributes,
            start_time=start,
        )
        if event.status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        parent = trace.set_span_in_context(span)
        for phase, duration in event.phases.items():
            child = otel.start_span(phase, parent, start_time=start)
            start = min(end, start + int(duration * _TO_NS))
            child.end(start)
        span.end(end)

    return record
