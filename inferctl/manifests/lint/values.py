"""Rules on values that Kubernetes refuses, or reads as something else than was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from inferctl.manifests.kubernetes import selectors
from inferctl.manifests.kubernetes.fields import as_float, integer, is_extended, mapping, sequence, text
from inferctl.manifests.lint.finding import Hit, LintContext, rule
from inferctl.manifests.lint.manifests import Manifests, ManifestWorkload
from inferctl.manifests.manifests_file import FieldPath

_ENUMS = {
    "whenUnsatisfiable": ("DoNotSchedule", "ScheduleAnyway"),
    "nodeTaintsPolicy": ("Honor", "Ignore"),
    "nodeAffinityPolicy": ("Honor", "Ignore"),
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute", ""),
    "preemptionPolicy": ("Never", "PreemptLowerPriority"),
    "unhealthyPodEvictionPolicy": ("AlwaysAllow", "IfHealthyBudget"),
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
}
# Fields with other meanings in custom resources.
_CORE = ("v1", "apps/v1", "batch/v1", "policy/v1", "scheduling.k8s.io/v1")


@rule(
    "bad-value",
    "error",
    "placement",
    finds="a quantity, a maxSkew, a successThreshold or a word of a fixed list that is not allowed, a request above "
    "its limit, a part of an extended resource such as a GPU, a minimum of replicas above the maximum, a mount of a "
    "volume that the pod does not have, or a node label that no node can have",
    consequence="the API server refuses the object",
    fix="correct the value",
)
def _values(manifests: Manifests, _: LintContext) -> Iterator[Hit]:
    for each in manifests.objects:
        if each.api_version in _CORE:
            for path, what in _bad(each.data, ()):
                yield Hit(each, path, what)
    for workload in manifests.workloads:
        if workload.object.api_version in _CORE:  # controllers of others add volumes
            for path, what in _mounts(workload):
                yield Hit(workload.object, path, what)
            for path, what in selectors.refused_by_api_server(workload.spec):
                yield Hit(workload.object, (*workload.spec_path, *path), what)
    for each in manifests.autoscalers:
        keda = each.kind == "ScaledObject"
        low, high = ("minReplicaCount", "maxReplicaCount") if keda else ("minReplicas", "maxReplicas")
        least, most = integer(each.data, "spec", low), integer(each.data, "spec", high)
        if least is not None and most is not None and least > most:
            consequence = "KEDA refuses the object, or makes no HPA for it" if keda else None
            yield Hit(each, ("spec", low), f"{low} {least} is above {high} {most}", consequence=consequence)


def _bad(value: Any, path: FieldPath) -> Iterator[tuple[FieldPath, str]]:
    """Yield the path and the description of each bad value under `value`."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _bad(item, (*path, index))
    if not isinstance(value, dict) or path[-1:] in (("data",), ("labels",), ("annotations",), ("matchLabels",)):
        return
    for key, item in value.items():
        here = (*path, key)
        if key in _ENUMS and isinstance(item, str) and item not in _ENUMS[key]:
            yield here, f"{key} is {item!r}; allowed: {', '.join(word for word in _ENUMS[key] if word)}"
        elif key == "maxSkew" and isinstance(item, int) and item < 1:
            yield here, f"maxSkew is {item}; the smallest is 1"
        elif key in ("livenessProbe", "startupProbe") and integer(item, "successThreshold") not in (None, 0, 1):
            yield (*here, "successThreshold"), f"successThreshold of a {key} other than 1"
        elif key in ("limits", "requests") and "resources" in path and isinstance(item, dict):
            for name, amount in item.items():
                number = as_float(amount)
                if number is None or number < 0:
                    yield (*here, name), f"{name}: {amount!r} is not a quantity such as 500m, 2 or 16Gi"
                elif is_extended(name) and not number.is_integer():
                    yield (*here, name), f"{name}: {amount}, but only CPUs can be divided"
                elif key == "requests" and (what := _above_limit(name, number, mapping(value, "limits"))):
                    yield (*here, name), what
        elif key == "sizeLimit" and as_float(item) is None:
            yield here, f"sizeLimit: {item!r} is not a quantity such as 2Gi"
        yield from _bad(item, here)


def _above_limit(name: str, number: float, limits: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a request next to its limit. GPUs have a rule of their own."""
    limit = None if is_extended(name) else as_float(limits.get(name))
    return f"{name}: the request is above the limit {limits[name]}" if limit is not None and number > limit else None


def _mounts(workload: ManifestWorkload) -> Iterator[tuple[FieldPath, str]]:
    """Yield the path and the description of each mount of a volume that the pod does not have."""
    claims = sequence(workload.object.data, "spec", "volumeClaimTemplates")
    known = {text(each, "name") for each in sequence(workload.spec, "volumes")}
    known |= {text(each, "metadata", "name") for each in claims}
    for container in workload.all_containers:
        for key in ("volumeMounts", "volumeDevices"):
            for index, mount in enumerate(sequence(container.data, key)):
                if (name := text(mount, "name")) and name not in known:
                    yield (*container.path, key, index), f"container {container.name} mounts {name}, which is no volume"


@rule(
    "amount-too-small",
    "warning",
    "neighbors",
    finds="memory or ephemeral storage below 1 MiB",
    consequence="a number without a unit counts bytes, and m means thousandths: with such a limit the container cannot "
    "start, and such a request keeps nothing free",
    fix="add a unit, such as Mi or Gi",
)
def _too_small(manifests: Manifests, _: LintContext) -> Iterator[Hit]:
    for workload in manifests.workloads:
        places = [(workload.spec_path, workload.spec), *((each.path, each.data) for each in workload.all_containers)]
        for path, data in places:
            for key in ("limits", "requests"):
                for name in ("memory", "ephemeral-storage"):
                    amount = mapping(data, "resources", key).get(name)
                    if 0 < (as_float(amount) or 0) < 2**20:
                        what = f"{key}.{name} is {amount}, less than 1 MiB"
                        yield Hit(workload.object, (*path, "resources", key, name), what)
