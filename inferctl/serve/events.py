"""What receives the usage events of a server: its metrics, its metering, its request log and its traces."""

from __future__ import annotations

from collections.abc import Callable

import inferctl
from inferctl.serve import logs
from inferctl.serve.edge import usage
from inferctl.serve.edge.usage import UsageEvent
from inferctl.serve.metrics import RequestMetrics


def emitter(
    metrics: RequestMetrics, log: str, traces: bool, name: str, *more: Callable[[UsageEvent], None]
) -> Callable[[UsageEvent], None]:
    """Return the function that the edge calls with each event.

    `log`: text or json. `name`: of the model, in traces. `more`: further sinks, such as that of metering.
    """
    sinks: list[Callable[[UsageEvent], None]] = [metrics.count_event, *more]
    if log == "json":
        sinks.append(logs.log_request)
    if traces:
        from inferctl.serve import tracing

        sinks.append(tracing.tracer(name, inferctl.__version__))
    return usage.emitter(sinks)
