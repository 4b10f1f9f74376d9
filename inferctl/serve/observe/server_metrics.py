"""The metrics of one process of a server of encoder models: those of each model, and what is of none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric

from inferctl.serve.observe import samples
from inferctl.serve.observe.metrics import Metrics, RequestMetrics
from inferctl.tenancy.metering.usage_event import UsageEvent


class ServerMetrics:
    """`general`: of the process, and of requests that no model computed. With one model, all is of it."""

    count_event: Callable[[UsageEvent], None]

    def __init__(self, models: Mapping[str, Metrics]) -> None:
        self._models, (first, *others) = models, models.values()
        self.general: RequestMetrics = RequestMetrics() if others else first
        self.count_event = self._count if others else first.count_event
        self._own = [self.general.registry] if others else []  # without its gauges of a queue, which it has not

    def _count(self, event: UsageEvent) -> None:
        self._models.get(event.model or "", self.general).count_event(event)

    def report(self) -> samples.Samples:
        """Return what an API process reports."""
        registries = [*self._own, *(each.registry for each in self._models.values())]
        return [found for registry in registries for found in samples.of(registry)]

    def exposition(self, others: samples.Totals | None = None) -> tuple[bytes, str]:
        """Return the text that Prometheus scrapes, and its media type. `others`: what API processes counted."""
        if others is None and not self._own:
            return self.general.exposition()
        others = others or samples.Totals()
        for registry in self._own:
            others.set(self, samples.of(registry))
        own = chain.from_iterable(each.registry.collect() for each in self._models.values())
        return generate_latest(_Collected(list(others.collect(own)))), CONTENT_TYPE_LATEST


class _Collected(CollectorRegistry):
    """Metrics that were collected before."""

    def __init__(self, metrics: list[Metric]) -> None:
        super().__init__()
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        yield from self._metrics
