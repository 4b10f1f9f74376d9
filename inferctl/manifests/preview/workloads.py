"""The Deployments and Jobs of manifests: their pods, replicas, and what their annotations say about capacity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.manifests.kubernetes import fields
from inferctl.manifests.label_keys import NAME, PEAK, PREFERENCE, RATE, UTILIZATION


@dataclass(frozen=True)
class Scaler:
    """The replicas that an autoscaler may set, and the peak in tokens per second that it is made for, if stated."""

    kind: str
    least: int
    most: int
    peak: float | None = None


@dataclass(frozen=True)
class SimulatedDeployment:
    """A Deployment, or a Job, which has no selector, runs `parallelism` pods, and serves nothing.

    `least` and `most` are its replicas: those of its autoscaler, else `spec.replicas`. `rate` is in tokens per second
    and replica, of which `utilization` is planned for; `peak` is what all Deployments of the model must serve in this
    cluster; `preference` says which of them does so first. None if it is not stated.
    """

    namespace: str
    name: str
    model: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    selector: Mapping[str, Any]
    least: int
    most: int
    rate: float | None = None
    utilization: float = 1.0
    preference: int = 0
    peak: float | None = None
    scaled_by: str = ""

    @property
    def key(self) -> str:
        """The name of the workload in messages: with its namespace, unless that is the default one."""
        return self.name if self.namespace == "default" else f"{self.namespace}/{self.name}"

    @property
    def placeholder(self) -> bool:
        """Whether the pods only hold capacity: they run nothing but a pause image."""
        images = [fields.text(each, "image") for each in fields.items(self.spec, "containers")]
        return bool(images) and all(fields.is_pause(image) for image in images)


def find(objects: Iterable[Mapping[str, Any]], namespace: str = "default") -> list[SimulatedDeployment]:
    """Return the Deployments and Jobs among `objects` in their order. `namespace`: for objects that name none."""
    objects = list(objects)
    scalers: dict[tuple[str, str], Scaler] = {}
    for each in objects:
        if found := _scaler(each):
            scalers[fields.namespace_of(each, namespace), fields.text(each, "spec", "scaleTargetRef", "name")] = found
    return [
        _workload(each, fields.namespace_of(each, namespace), scalers)
        for each in objects
        if each.get("kind") in ("Deployment", "Job") and fields.text(each, "metadata", "name")
    ]


def _workload(
    item: Mapping[str, Any], namespace: str, scalers: Mapping[tuple[str, str], Scaler]
) -> SimulatedDeployment:
    name = fields.text(item, "metadata", "name")
    template = fields.mapping(item, "spec", "template")
    labels = fields.text_map(fields.mapping(template, "metadata", "labels"))
    annotations = fields.text_map(fields.mapping(item, "metadata", "annotations"))
    key = "parallelism" if item.get("kind") == "Job" else "replicas"
    replicas = fields.integer(item, "spec", key, default=1)
    scaler = scalers.get((namespace, name), Scaler("", replicas, replicas))
    return SimulatedDeployment(
        namespace,
        name,
        labels.get(NAME, name),
        labels,
        fields.mapping(template, "spec"),
        fields.mapping(item, "spec", "selector"),
        scaler.least,
        scaler.most,
        rate=_number(annotations.get(RATE)),
        utilization=_number(annotations.get(UTILIZATION)) or 1.0,
        preference=int(_number(annotations.get(PREFERENCE)) or 0),
        peak=scaler.peak or _number(annotations.get(PEAK)),
        scaled_by=scaler.kind,
    )


def _scaler(item: Mapping[str, Any]) -> Scaler | None:
    """Return the limits of a ScaledObject or HorizontalPodAutoscaler of a Deployment; None for other objects."""
    limits = fields.replica_limits(item)
    if limits is None or fields.text(item, "spec", "scaleTargetRef", "kind") not in ("", "Deployment"):
        return None
    return Scaler(str(item["kind"]), *limits, _number(fields.text(item, "metadata", "annotations", PEAK)))


def _number(text: str | None) -> float | None:
    try:
        number = float(text) if text else None
    except ValueError:
        return None
    return number if number is not None and math.isfinite(number) else None


def serving(workloads: Sequence[SimulatedDeployment]) -> dict[str, list[SimulatedDeployment]]:
    """Return the workloads that serve, by model and in order of preference.

    Those with a rate, if there are any: then others are gateways, relays and the like. Placeholders do not serve.
    """
    rated = [each for each in workloads if each.rate is not None]
    found: dict[str, list[SimulatedDeployment]] = {}
    for each in sorted(rated or workloads, key=lambda each: each.preference):
        if each.selector and not each.placeholder:
            found.setdefault(each.model, []).append(each)
    return found
