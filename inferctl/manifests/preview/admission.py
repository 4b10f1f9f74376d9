"""What the API server does with a pod before the scheduler sees it: defaults, priority, overhead and quota."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from inferctl.manifests.kubernetes import fields, resources, selectors
from inferctl.manifests.kubernetes.taints import Taint, tolerates
from inferctl.manifests.preview.cluster import ClusterState, Pod

# The classes that every cluster has.
_SYSTEM_CLASSES = {"system-cluster-critical": 2_000_000_000, "system-node-critical": 2_000_001_000}
# Unless a pod says otherwise, it stays this long on a node that is lost.
EVICTION_S = 300
_LOST = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
# A quota on one of these refuses pods that do not state it. For other resources, an absent request is zero.
_MUST_STATE = ("cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory")


def admitted(
    objects: Mapping[str, Sequence[Mapping[str, Any]]],
    namespace: str,
    name: str,
    labels: Mapping[str, str],
    spec: Mapping[str, Any],
) -> Pod:
    """Return the pod that the API server makes of a pod spec. Raises `ValueError` for an invalid quantity."""
    spec = dict(spec)
    tolerations = fields.items(spec, "tolerations")
    for key in _LOST:
        if not tolerates(tolerations, Taint(key, "", "NoExecute")):
            added = {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": EVICTION_S}
            tolerations = [*tolerations, added]
    spec["tolerations"] = tolerations
    runtime = _named(objects, "RuntimeClass", fields.text(spec, "runtimeClassName"))
    if runtime:
        if "overhead" not in spec:
            spec["overhead"] = fields.mapping(runtime, "overhead", "podFixed")
        spec["nodeSelector"] = {
            **fields.mapping(runtime, "scheduling", "nodeSelector"),
            **fields.mapping(spec, "nodeSelector"),
        }
        spec["tolerations"] = [*tolerations, *fields.items(runtime, "scheduling", "tolerations")]
    found = _class(objects, fields.text(spec, "priorityClassName"))
    # A new pod without a class gets the default one, also for the scopes of quotas. A running pod states its priority.
    if (
        not spec.get("priorityClassName")
        and "priority" not in spec
        and (default := fields.text(found, "metadata", "name"))
    ):
        spec["priorityClassName"] = default
    policy = fields.text(spec, "preemptionPolicy") or fields.text(found, "preemptionPolicy")
    return Pod(
        namespace,
        name,
        labels,
        spec,
        requests=resources.of_pod(spec, "requests"),
        limits=resources.of_pod(spec, "limits"),
        priority=fields.integer(spec, "priority", default=fields.integer(found, "value", default=0)),
        preempts=policy != "Never",
    )


def _class(objects: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> Mapping[str, Any]:
    """Return the priority class, without a name the default one; an empty mapping if there is none."""
    if name:
        return _named(objects, "PriorityClass", name) or {"value": _SYSTEM_CLASSES.get(name, 0)}
    defaults = [each for each in objects.get("PriorityClass", ()) if each.get("globalDefault")]
    return min(defaults, key=lambda each: fields.integer(each, "value", default=0), default={})


def _named(objects: Mapping[str, Sequence[Mapping[str, Any]]], kind: str, name: str) -> Mapping[str, Any] | None:
    if not name:
        return None
    return next((each for each in objects.get(kind, ()) if fields.text(each, "metadata", "name") == name), None)


def refusal(cluster: ClusterState, pod: Pod) -> str | None:
    """Return why the API server refuses `pod`, which is not part of `cluster` yet; None if it accepts it."""
    name = fields.text(pod.spec, "priorityClassName")
    if name and name not in _SYSTEM_CLASSES and _named(cluster.objects, "PriorityClass", name) is None:
        return f"priority class {name} does not exist in the given files"
    for quota in cluster.of_kind("ResourceQuota"):
        if _applies(quota, pod) and (reason := _exceeded(cluster, quota, pod)):
            return f"quota {fields.text(quota, 'metadata', 'name')}: {reason}"
    return None


def _exceeded(cluster: ClusterState, quota: Mapping[str, Any], pod: Pod) -> str | None:
    hard = hard_limits(quota)
    if missing := [name for name in _MUST_STATE if name in hard and not _stated(pod, name)]:
        return f"a container does not state {', '.join(missing)}"
    asked = usage(pod)
    used: Counter[str] = Counter()
    for each in cluster.pods():
        if _applies(quota, each):
            used.update(usage(each))
    for name, most in hard.items():
        if name in asked and used[name] + asked[name] > most:
            amounts = (fields.show(name, amount) for amount in (asked[name], used[name], most))
            return "{}: {} requested, {} of {} used".format(name, *amounts)
    return None


def hard_limits(quota: Mapping[str, Any]) -> dict[str, int]:
    """Return the limits of a quota, with CPU in thousandths. Raises `ValueError` for an invalid quantity."""
    found = {}
    for name, value in fields.mapping(quota, "spec", "hard").items():
        # A quota counts `requests.cpu` in thousandths as well.
        plain = "cpu" if name.rpartition(".")[2] == "cpu" else name
        if value is not None:
            found[name] = fields.amounts({plain: value})[plain]
    return found


def usage(pod: Pod) -> dict[str, int]:
    """Return what a pod counts in quotas, by the names that quotas use."""
    found = {"pods": 1, "count/pods": 1}
    for name, amount in pod.requests.items():
        found[f"requests.{name}"] = amount
        if not fields.is_extended(name):
            found[name] = amount
    for name, amount in pod.limits.items():
        if name in ("cpu", "memory", "ephemeral-storage"):
            found[f"limits.{name}"] = amount
    return found


def _stated(pod: Pod, name: str) -> bool:
    """Return whether every container states the resource that a quota names, such as `limits.memory` or `cpu`."""
    kind, _, resource = name.rpartition(".")
    which: resources.Kind = "limits" if kind == "limits" else "requests"
    if resource in resources.of_container({"resources": fields.mapping(pod.spec, "resources")}, which):
        return True
    containers = [*fields.items(pod.spec, "containers"), *fields.items(pod.spec, "initContainers")]
    return all(resource in resources.of_container(each, which) for each in containers)


def _applies(quota: Mapping[str, Any], pod: Pod) -> bool:
    if fields.namespace_of(quota) != pod.namespace:
        return False
    scopes = [{"scopeName": name, "operator": "Exists"} for name in fields.strings(quota, "spec", "scopes")]
    scopes += fields.items(quota, "spec", "scopeSelector", "matchExpressions")
    return all(_in_scope(scope, pod) for scope in scopes)


def _in_scope(scope: Mapping[str, Any], pod: Pod) -> bool:
    match fields.text(scope, "scopeName"):
        case "Terminating":
            return fields.get(pod.spec, "activeDeadlineSeconds") is not None
        case "NotTerminating":
            return fields.get(pod.spec, "activeDeadlineSeconds") is None
        case "BestEffort":
            return resources.best_effort(pod.spec)
        case "NotBestEffort":
            return not resources.best_effort(pod.spec)
        case "PriorityClass":
            name = fields.text(pod.spec, "priorityClassName")
            labels = {"PriorityClass": name} if name else {}
            return selectors.matches({"matchExpressions": [{**scope, "key": "PriorityClass"}]}, labels)
    return False
