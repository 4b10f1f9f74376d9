"""OpenTelemetry spans of requests, written once a request has ended: nothing of it runs while one is computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from inferctl.errors import UsageError

_TO_NS = 1_000_000_000


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's own variables say where traces go."""
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return any(environment.get(name) for name in names) and not disabled


def tracer(
    name: str, version: str, processor: Any = None
) -> Callable[[Iterable[tuple[bytes, bytes]], str, int, int, float, dict[str, float]], None]:
    """What `app.State.trace` calls. Where spans go, and everything else, is read from OTEL_* variables by the SDK itself.

    `processor`: a span processor instead of the OTLP exporter. Raises `UsageError` when the packages are not installed.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if processor is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            processor = BatchSpanProcessor(OTLPSpanExporter())
    except ModuleNotFoundError as error:
        raise UsageError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, and {error.name} is not installed",
            "pip install 'inferctl[otel]', or unset the variable",
        ) from None
    # Variables win over what is set here: OTEL_SERVICE_NAME names the service.
    provider = TracerProvider(resource=Resource.create({"service.name": "inferctl", "service.version": version}))
    provider.add_span_processor(processor)
    made = provider.get_tracer("inferctl")
    propagator = TraceContextTextMapPropagator()

    def record(
        headers: Iterable[tuple[bytes, bytes]],
        request: str,
        status: int,
        tokens: int,
        seconds: float,
        phases: dict[str, float],
    ) -> None:
        end = time.time_ns()
        at = end - int(seconds * _TO_NS)
        carrier = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers if key.startswith(b"trace")}
        attributes = {
            "http.request.method": "POST",
            "http.route": "/v1/embeddings",
            "http.response.status_code": status,
            "gen_ai.operation.name": "embeddings",
            "gen_ai.request.model": name,
            "gen_ai.usage.input_tokens": tokens,
            "inferctl.request_id": request,
        }
        span = made.start_span(
            "embeddings",
            propagator.extract(carrier),
            trace.SpanKind.SERVER,
            attributes,
            start_time=at,
        )
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        inside = trace.set_span_in_context(span)
        for phase, spent in phases.items():
            child = made.start_span(phase, inside, start_time=at)
            at = min(end, at + int(spent * _TO_NS))
            child.end(at)
        span.end(end)

    return record
