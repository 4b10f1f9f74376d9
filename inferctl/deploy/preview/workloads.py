"""The Deployments of manifests: their pods, replicas, and what their annotations say about capacity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from inferctl.deploy.preview import fields

# Annotations of a Deployment with which `inferctl deploy` states what a replica can do.
RATE = "inferctl.io/tokens-per-second"
PEAK = "inferctl.io/peak-tokens-per-second"
LOAD = "inferctl.io/load-seconds"
COLD_START = "inferctl.io/cold-start-seconds"
_MODEL = "app.kubernetes.io/name"
_COMPONENT = "app.kubernetes.io/component"


@dataclass(frozen=True)
class Workload:
    """A Deployment.

    `least` and `most` are its replicas at rest and at the peak: those of its autoscaler, else `spec.replicas`. `rate`
    is in tokens per second and replica, `peak` the tokens per second of all clusters that the model must serve;
    `load_s` from start until ready, `cold_start_s` with a new node. None if the Deployment does not state it.
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
    peak: float | None = None
    load_s: float | None = None
    cold_start_s: float | None = None
    component: str = ""
    scaled_by: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name of the workload in messages: with its namespace, unless that is the default one."""
        return self.name if self.namespace == "default" else f"{self.namespace}/{self.name}"

    @property
    def placeholder(self) -> bool:
        """Whether the pods only hold capacity: they run nothing but a pause image."""
        images = [fields.text(each, "image") for each in fields.items(self.spec, "containers")]
        return bool(images) and all(_is_pause(image) for image in images)


def _is_pause(image: str) -> bool:
    return image.partition("@")[0].rpartition("/")[2].partition(":")[0].startswith("pause")


def find(objects: Iterable[Mapping[str, Any]], namespace: str = "default") -> list[Workload]:
    """Return the Deployments among `objects` in their order. `namespace`: for objects that name none."""
    objects = list(objects)
    scalers = {
        (_namespace(each, namespace), target): limits
        for each in objects
        if (found := _scaler(each)) is not None
        for target, limits in [found]
    }
    return [
        _workload(each, _namespace(each, namespace), scalers)
        for each in objects
        if each.get("kind") == "Deployment" and fields.text(each, "metadata", "name")
    ]


def _workload(item: Mapping[str, Any], namespace: str, scalers: Mapping[tuple[str, str], tuple[str, int, int]]) -> Workload:
    name = fields.text(item, "metadata", "name")
    template = fields.mapping(item, "spec", "template")
    labels = fields.text_map(fields.mapping(template, "metadata", "labels"))
    annotations = fields.text_map(fields.mapping(item, "metadata", "annotations"))
    replicas = fields.integer(item, "spec", "replicas", default=1)
    scaled_by, least, most = scalers.get((namespace, name), ("", replicas, replicas))
    return Workload(
        namespace,
        name,
        labels.get(_MODEL, name),
        labels,
        fields.mapping(template, "spec"),
        fields.mapping(item, "spec", "selector"),
        least,
        most,
        rate=_number(annotations.get(RATE)),
        peak=_number(annotations.get(PEAK)),
        load_s=_number(annotations.get(LOAD)),
        cold_start_s=_number(annotations.get(COLD_START)),
        component=labels.get(_COMPONENT, ""),
        scaled_by=scaled_by,
        annotations=annotations,
    )


def _scaler(item: Mapping[str, Any]) -> tuple[str, tuple[str, int, int]] | None:
    """Return the Deployment that a ScaledObject or HorizontalPodAutoscaler scales: its name, kind, least and most."""
    kind, target = item.get("kind"), fields.mapping(item, "spec", "scaleTargetRef")
    if target.get("kind", "Deployment") != "Deployment":
        return None
    if kind == "ScaledObject":
        # The defaults of KEDA.
        least = fields.integer(item, "spec", "minReplicaCount", default=0)
        most = fields.integer(item, "spec", "maxReplicaCount", default=100)
    elif kind == "HorizontalPodAutoscaler":
        least = fields.integer(item, "spec", "minReplicas", default=1)
        most = fields.integer(item, "spec", "maxReplicas", default=least)
    else:
        return None
    return fields.text(target, "name"), (str(kind), least, max(least, most))


def _namespace(item: Mapping[str, Any], default: str) -> str:
    return fields.text(item, "metadata", "namespace") or default


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


