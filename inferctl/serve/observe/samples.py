"""The metrics of several processes as those of one server: what each counted is added up, and never falls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

# Of each metric: name, description and kind, then name, labels and value of each sample. It is JSON.
Samples: TypeAlias = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]
_Key: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]

# Gauges of API processes; the other gauges are of the backend. The age of the oldest event is the highest of all.
_GAUGES = "inferctl_outbox_"
_OLDEST = "inferctl_outbox_age_seconds"
# A gauge that counts. If it fell, an alert would take what the other processes dropped long ago for new.
_DROPPED = "inferctl_outbox_dropped_events"


def of(registry: CollectorRegistry) -> Samples:
    """Return the samples that an API process reports."""
    return [
        (
            metric.name,
            metric.documentation,
            metric.type,
            [(each.name, each.labels, each.value) for each in metric.samples],
        )
        for metric in registry.collect()
        if metric.type in ("counter", "histogram") or metric.name.startswith(_GAUGES)
    ]


class Totals:
    """The samples of the API processes of a server, also of those that ended."""

    def __init__(self) -> None:
        self._latest: dict[object, Samples] = {}
        self._ended: Samples = []

    def set(self, process: object, found: Samples) -> None:
        """Take the samples of a process, in place of its last ones."""
        self._latest[process] = found

    def retire(self, process: object) -> None:
        """Keep what a process that ended counted. Its other gauges end with it."""
        found = [each for each in self._latest.pop(process, []) if each[2] != "gauge" or each[0] == _DROPPED]
        merged = _merge([], [self._ended, found])
        self._ended = [
            (each.name, each.documentation, each.type, [(*s[:2], s[2]) for s in each.samples]) for each in merged
        ]

    def collect(self, own: Iterable[Metric]) -> Iterator[Metric]:
        """Yield the metrics `own` with those of the processes added."""
        yield from _merge(own, [self._ended, *self._latest.values()])


def _merge(own: Iterable[Metric], others: list[Samples]) -> list[Metric]:
    families: dict[str, tuple[Metric, dict[_Key, float]]] = {}
    for metric in own:
        _, values = families.setdefault(metric.name, (metric, {}))
        values |= {_key(each.name, each.labels): each.value for each in metric.samples}
    for name, description, kind, found in (family for samples in others for family in samples):
        _, values = families.setdefault(name, (Metric(name, description, kind), {}))
        for sample, labels, value in found:
            key = _key(sample, labels)
            if key not in values:
                values[key] = value
            elif sample.endswith("_created"):
                values[key] = min(values[key], value)
            else:
                values[key] = max(values[key], value) if name == _OLDEST else values[key] + value
    merged = []
    for metric, values in families.values():
        total = Metric(metric.name, metric.documentation, metric.type)
        for (sample, pairs), value in values.items():
            total.add_sample(sample, dict(pairs), value)
        merged.append(total)
    return merged


def _key(name: str, labels: dict[str, str]) -> _Key:
    return name, tuple(labels.items())
