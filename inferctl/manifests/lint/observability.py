"""Rules on what is seen: alerts, recorded series, scraped ports, and routers that read metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from inferctl.core.errors import did_you_mean
from inferctl.manifests import metric_names
from inferctl.manifests.kubernetes import selectors
from inferctl.manifests.kubernetes.fields import get, mapping, sequence, text
from inferctl.manifests.lint.finding import Hit, rule
from inferctl.manifests.lint.manifests import Manifests, same_namespace
from inferctl.manifests.manifests_file import FieldPath, Located

_STRINGS = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|`[^`]*`")


def _rules(manifests: Manifests) -> Iterator[tuple[Located, FieldPath, Mapping[str, Any]]]:
    for each in manifests.of("PrometheusRule"):
        for number, group in enumerate(sequence(each.data, "spec", "groups")):
            for index, one in enumerate(sequence(group, "rules")):
                if isinstance(one, dict):
                    yield each, ("spec", "groups", number, "rules", index), one


def _expressions(manifests: Manifests) -> Iterator[tuple[Located, FieldPath, str]]:
    """Yield every PromQL expression: of rules, and of prometheus triggers of KEDA."""
    for each, path, one in _rules(manifests):
        yield each, (*path, "expr"), str(one.get("expr") if one.get("expr") is not None else "")
    for each in manifests.of("ScaledObject"):
        for index, trigger in enumerate(sequence(each.data, "spec", "triggers")):
            if get(trigger, "type") == "prometheus" and text(trigger, "metadata", "query"):
                yield each, ("spec", "triggers", index, "metadata", "query"), text(trigger, "metadata", "query")


@rule(
    "unknown-metric",
    "error",
    "observability",
    finds="a metric inferctl_... that no server of inferctl has",
    consequence="the expression is empty forever: no error, no alert, no scaling",
    fix="use a name of `GET /metrics`; names of counters end with _total",
)
def _metric(manifests: Manifests) -> Iterator[Hit]:
    recorded = {str(one.get("record")) for _, _, one in _rules(manifests) if one.get("record")}
    for each, path, expression in _expressions(manifests):
        for name in unknown_metrics(expression):
            if name not in recorded:
                close = did_you_mean(name, sorted(metric_names.SERVER))
                yield Hit(each, path, f"there is no metric {name}{f'; {close}' if close else ''}")


def unknown_metrics(expression: str) -> list[str]:
    """Return the names inferctl_... in `expression` that no server of inferctl has, in alphabetical order."""
    names = metric_names.used(_STRINGS.sub('""', expression)) - metric_names.SERVER
    return sorted(name for name in names if name.startswith("inferctl_"))


@rule(
    "monitor-port",
    "error",
    "observability",
    finds="a ServiceMonitor or PodMonitor for a port that the Service or the pods do not have, or without a target",
    consequence="Prometheus scrapes nothing and shows no error",
    fix="use the name of a port in spec.ports of the Service, and labels that the Service has",
)
def _monitor(manifests: Manifests) -> Iterator[Hit]:
    for monitor in manifests.of("ServiceMonitor"):
        services = [each for each in manifests.of("Service") if _in_reach(monitor, each)]
        selected = [
            each for each in services if selectors.matches(mapping(monitor.data, "spec", "selector"), each.labels)
        ]
        if services and not selected:
            what = "the selector selects no Service of these manifests"
            yield Hit(monitor, ("spec", "selector"), what, level="warning")
        for index, endpoint in enumerate(sequence(monitor.data, "spec", "endpoints")):
            name = get(endpoint, "port")
            names = [text(port, "name") for each in selected for port in sequence(each.data, "spec", "ports")]
            # A monitor of several Services may have an endpoint for each: Prometheus drops those that are not there.
            if selected and name is not None and name not in names:
                shown = ", ".join(dict.fromkeys(each for each in names if each)) or "no names"
                services_ = f"the Service {selected[0].name} has" if len(selected) == 1 else "its Services have"
                what = f"{services_} no port named {name!r}, but {shown}"
                yield Hit(monitor, ("spec", "endpoints", index, "port"), what)
    for monitor in manifests.of("PodMonitor"):
        for index, endpoint in enumerate(sequence(monitor.data, "spec", "podMetricsEndpoints")):
            name = get(endpoint, "port")
            selector = mapping(monitor.data, "spec", "selector")
            known = [each for each in manifests.selected(monitor, selector) if each.port_names is not None]
            if known and name is not None and not any(name in (each.port_names or ()) for each in known):
                what = f"the pods of {known[0].object.name} have no port named {name!r}"
                yield Hit(monitor, ("spec", "podMetricsEndpoints", index, "port"), what)


def _in_reach(monitor: Located, service: Located) -> bool:
    """Return whether a ServiceMonitor looks into the namespace of a Service."""
    return bool(mapping(monitor.data, "spec", "namespaceSelector")) or same_namespace(monitor, service)
