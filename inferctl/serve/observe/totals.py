"""Counters and histograms that cost little per event, and become metrics of Prometheus at the scrape.

Those of the client library validate labels and take locks: 8 us for each request, these 2 us. Only one thread counts.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString


class Total:
    """A number that only grows."""

    def __init__(self) -> None:
        self._value, self._created = 0.0, time.time()

    def inc(self, amount: float = 1) -> None:
        """Add `amount`, which is not negative."""
        self._value += amount

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Yield suffix, labels and value of each sample."""
        yield "_total", {}, self._value
        yield "_created", {}, self._created


class Distribution:
    """Values by the smallest of `bounds` that they do not exceed."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._created = [*bounds, INF], time.time()
        self._counts, self._sum = [0] * len(self._bounds), 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Yield suffix, labels and value of each sample."""
        count = 0
        for bound, each in zip(self._bounds, self._counts, strict=True):
            count += each
            yield "_bucket", {"le": floatToGoString(bound)}, count  # type: ignore[no-untyped-call]
        yield "_count", {}, count
        yield "_sum", {}, self._sum
        yield "_created", {}, self._created


T = TypeVar("T", Total, Distribution)


class Family(Collector, Generic[T]):
    """One metric: what `create` returns, for each value of its labels."""

    def __init__(self, name: str, description: str, kind: str, create: Callable[[], T], labels: Sequence[str]) -> None:
        self._texts, self._names = (name, description, kind), labels
        self._create: Callable[[], T] = create
        self._children: dict[tuple[object, ...], T] = {}

    def labels(self, *values: object) -> T:
        """Return the total or the distribution with these values of the labels."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._create()
        return child

    def collect(self) -> Iterator[Metric]:
        """Yield the metric. Called for each scrape."""
        metric = Metric(*self._texts)
        for values, child in self._children.items():
            named = dict(zip(self._names, map(str, values), strict=True))
            for suffix, labels, value in child.samples():
                metric.add_sample(metric.name + suffix, named | labels, value)
        yield metric
