"""Builds the Kubernetes objects of the tests of lint and preview."""

from __future__ import annotations

import math
from typing import Any

# Values of other types than a field has, and values that a reader could fail on.
JUNK: list[Any] = [
    None, True, -1, 3.5, "", "text", "[/]", [], {}, [[]], [None], {"a": None}, [{}], {"name": []}, "9" * 400, 2**64,
    math.inf, math.nan, "500m", "-1Gi",
]  # fmt: skip
_VERSIONS = {
    "Deployment": "apps/v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "PodDisruptionBudget": "policy/v1",
    "PriorityClass": "scheduling.k8s.io/v1",
    "ScaledObject": "keda.sh/v1alpha1",
    "StatefulSet": "apps/v1",
}


def thing(kind: str, name: str, spec: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return an object. `more`: fields, and labels, annotations and namespace of the metadata."""
    metadata = {"name": name} | {key: more.pop(key) for key in ("labels", "annotations", "namespace") if key in more}
    fields = ({} if spec is None else {"spec": spec}) | more
    return {"apiVersion": _VERSIONS.get(kind, "v1"), "kind": kind, "metadata": metadata, **fields}


def deployment(
    name: str, labels: dict[str, str], pod: dict[str, Any], replicas: int | None = None, **metadata: Any
) -> dict[str, Any]:
    """Return a Deployment of `pod`, the spec of its pods, which have `labels`."""
    spec = {} if replicas is None else {"replicas": replicas}
    template = {"metadata": {"labels": labels}, "spec": pod}
    return thing("Deployment", name, {**spec, "selector": {"matchLabels": labels}, "template": template}, **metadata)


def running(name: str, on: str, labels: dict[str, str], pod: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a pod that runs on a node. `more`: of its status, or its namespace."""
    metadata = {"labels": labels} | ({"namespace": more.pop("namespace")} if "namespace" in more else {})
    return thing("Pod", name, {"nodeName": on, **pod}, **metadata, status={"phase": "Running", **more})
