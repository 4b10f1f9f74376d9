"""How a pod gets its GPU, and on which nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inferctl.deploy.objects.metadata import Object
from inferctl.deploy.plan import GpuResource

# Key of the usual taint of nodes with a GPU.
_TAINT = "nvidia.com/gpu"


def limits(resource: GpuResource | None) -> dict[str, Any]:
    """Return the extended resource of a container. Requests and limits of these must be equal."""
    return {resource.name: resource.count} if resource else {}


def placement(resource: GpuResource | None) -> Object:
    """Return the fields of a pod spec that send it to the nodes of its hardware: affinity and tolerations."""
    if resource is None:
        return {}
    toleration = {"key": _TAINT, "operator": "Exists", "effect": "NoSchedule"}
    return {"affinity": _node_affinity(resource.labels), "tolerations": [toleration]}


def _node_affinity(labels: Mapping[str, Sequence[str]]) -> Object:
    """Return a required affinity to nodes that have one of the values of each label, or not a label without values."""
    terms: list[Object] = [
        {"key": key, "operator": "In", "values": list(values)} if values else {"key": key, "operator": "DoesNotExist"}
        for key, values in labels.items()
    ]
    required = {"nodeSelectorTerms": [{"matchExpressions": terms}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
