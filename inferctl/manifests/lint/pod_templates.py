"""Where objects have pod templates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from inferctl.manifests.kubernetes.fields import get, mapping, sequence
from inferctl.manifests.manifests_file import FieldPath, Located

# Kind -> path of its pod template.
_TEMPLATES: Mapping[str, FieldPath] = {
    "Pod": (),
    "PodTemplate": ("template",),
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "LeaderWorkerSet": ("spec", "leaderWorkerTemplate", "workerTemplate"),
    # Of Argo.
    "Rollout": ("spec", "template"),
}
LEADER: FieldPath = ("spec", "leaderWorkerTemplate", "leaderTemplate")
_RAY: Mapping[str, FieldPath] = {"RayCluster": ("spec",), "RayService": ("spec", "rayClusterConfig")}


def paths(item: Located) -> list[FieldPath]:
    """Return the paths of the pod templates of an object; none for a kind that makes no pods, or is not known."""
    if item.kind in _RAY:
        base = _RAY[item.kind]
        groups = sequence(item.data, *base, "workerGroupSpecs")
        workers: list[FieldPath] = [(*base, "workerGroupSpecs", index, "template") for index in range(len(groups))]
        return [(*base, "headGroupSpec", "template"), *workers]
    if item.kind not in _TEMPLATES:
        return []
    leader = [LEADER] if item.kind == "LeaderWorkerSet" and get(item.data, *LEADER) else []
    return [*leader, _TEMPLATES[item.kind]]


def unread(objects: Sequence[Located]) -> dict[str, int]:
    """Return how many objects of which kinds have containers or models that no rule reads, such as those of KServe."""
    found = Counter(
        each.kind
        for each in objects
        if not paths(each) and (mapping(each.data, "spec", "predictor") or _has_containers(each.data))
    )
    return dict(sorted(found.items()))


def _has_containers(value: Any) -> bool:
    if isinstance(value, list):
        return any(_has_containers(each) for each in value)
    if not isinstance(value, dict):
        return False
    containers = value.get("containers")
    own = isinstance(containers, list) and any(isinstance(each, dict) and "image" in each for each in containers)
    return own or any(_has_containers(each) for each in value.values())
