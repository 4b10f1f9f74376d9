"""How replicas follow the load: the ScaledObject of KEDA, and the spare capacity.

All of it depends on the cluster: its share of the traffic, its limits and its Prometheus.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from inferctl.deploy import queries
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.figure import Noted, shown
from inferctl.deploy.objects.metadata import SERVER, Object, labels_of, metadata
from inferctl.deploy.objects.policy import OVERFLOW_PRIORITY
from inferctl.deploy.plan import FlavorPlan, ModelPlan, Placement
from inferctl.deploy.queries import Query
from inferctl.manifests import label_keys
from inferctl.manifests.kubernetes.resources import of_pod

DEFAULT_PROMETHEUS = "http://prometheus-operated.monitoring:9090"
# Component of the placeholders.
OVERFLOW = "overflow"
PAUSE_IMAGE = "registry.k8s.io/pause:3.10"
_POLLING_S = 15
_MIB = 1024 * 1024
_SCALE_DOWN_S = 300
# The longest window that a HorizontalPodAutoscaler accepts.
_LONGEST_WINDOW_S = 3600
_SCALE_DOWN_PERCENT = 25


def scaled_objects(model: ModelPlan, cluster: Cluster, namespace: str) -> list[Object]:
    """Return the ScaledObject of each flavor that has an autoscaler in `cluster`."""
    found = []
    for index, flavor in enumerate(model.flavors):
        if flavor.at(cluster).replicas is None:
            triggers = queries.of(model, model.flavors[: index + 1], cluster, namespace)
            found.append(_scaled_object(model, flavor, cluster, namespace, triggers))
    return found


def _scaled_object(
    model: ModelPlan, flavor: FlavorPlan, cluster: Cluster, namespace: str, triggers: list[Query]
) -> Object:
    """Return the ScaledObject of a flavor. KEDA takes the largest of its triggers.

    KEDA's defaults hurt: a minimum of 0, a value of 0 if a query returns nothing, and 30 s between two polls.
    """
    placed = flavor.at(cluster)
    labels = labels_of(model.name, SERVER, flavor.label)
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": metadata(flavor.name, namespace, labels, _peak(model, cluster)),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": flavor.name},
            "pollingInterval": _POLLING_S,
            "cooldownPeriod": _window(flavor),
            "minReplicaCount": placed.min_replicas.noted,
            "maxReplicaCount": placed.max_replicas.noted,
            "fallback": {"failureThreshold": 3, "replicas": _fallback(placed), "behavior": "currentReplicasIfHigher"},
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior(flavor)}},
            "triggers": [_trigger(cluster.prometheus or DEFAULT_PROMETHEUS, query) for query in triggers],
        },
    }


def _peak(model: ModelPlan, cluster: Cluster) -> dict[str, str | Noted]:
    """Return the annotation that says what all flavors of the model must serve in `cluster`."""
    if model.traffic is None:
        return {}
    share, peak = cluster.share if cluster.share is not None else 1.0, model.traffic.peak
    note = f"{shown(share)} x {shown(peak.value)} tokens/s; {peak.source}"
    return {label_keys.PEAK: Noted(f"{share * peak.value:.10g}", note)}


def behavior(flavor: FlavorPlan) -> Object:
    """Return how fast replicas are added and removed: at once when they are needed, slowly when they are not."""
    return {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "selectPolicy": "Max",
            "policies": [
                {"type": "Percent", "value": 100, "periodSeconds": 15},
                {"type": "Pods", "value": 4, "periodSeconds": 15},
            ],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": _window(flavor),
            "selectPolicy": "Max",
            "policies": [{"type": "Percent", "value": _SCALE_DOWN_PERCENT, "periodSeconds": 60}],
        },
    }


def overflow(model: ModelPlan, flavor: FlavorPlan, cluster: Cluster, deployment: Mapping[str, Any]) -> list[Object]:
    """Return the Deployment of pause pods that keep nodes for `flavor` in `cluster` alive and empty; none without.

    A server with a higher priority preempts them. `deployment`: that of the flavor as it is in this cluster, without
    notes. Each placeholder has its place, and requests as much as all containers of its pod, which fits in its place.
    """
    spare = flavor.at(cluster).overflow
    if spare is None:
        return []
    labels = labels_of(model.name, OVERFLOW, flavor.label)
    pod = deployment["spec"]["template"]["spec"]
    (server,) = (each for each in pod["containers"] if each["name"] == SERVER)
    affinity = {key: value for key, value in pod.get("affinity", {}).items() if key == "nodeAffinity"}
    template: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "priorityClassName": OVERFLOW_PRIORITY,
        "terminationGracePeriodSeconds": 0,
        "securityContext": pod["securityContext"],
        **({"affinity": affinity} if affinity else {}),
        **({"tolerations": pod["tolerations"]} if "tolerations" in pod else {}),
        "containers": [
            {
                "name": "pause",
                "image": PAUSE_IMAGE,
                "resources": _of_all_containers(pod, server),
                "securityContext": server["securityContext"],
            }
        ],
    }
    spec = {
        "replicas": spare.noted,
        "strategy": {"type": "Recreate"},  # a surge would need GPUs beyond the quota
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": template},
    }
    named = metadata(f"{flavor.name}-overflow", deployment["metadata"]["namespace"], labels)
    return [{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": named, "spec": spec}]


def _window(flavor: FlavorPlan) -> Noted:
    """Return the seconds without need after which replicas are removed: at least a cold start, which a return costs."""
    cold = flavor.cold_start_s
    value = min(_LONGEST_WINDOW_S, max(_SCALE_DOWN_S, math.ceil(cold.value)))
    formula = f"max({_SCALE_DOWN_S}, cold start {cold.value:g} s)"
    if cold.value > _LONGEST_WINDOW_S:
        formula = f"min({_LONGEST_WINDOW_S}, {formula})"
    return Noted(value, f"scale-down window: {formula}; {cold.source}")


def _fallback(placed: Placement) -> Noted:
    """Return the replicas without metrics: enough for the usual traffic. More that run are kept."""
    base = int(placed.at_base.value) if placed.at_base else 0
    value = min(int(placed.max_replicas.value), max(int(placed.min_replicas.value), base))
    return Noted(value, "without metrics: max(minimum, replicas at base), at most the maximum; more that run are kept")


def _trigger(server: str, query: Query) -> Object:
    return {
        "type": "prometheus",
        "name": query.name,
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": server,
            "query": Noted(query.promql, query.note),
            "threshold": "1",
            # With "true", a query without a result counts as 0 and removes replicas at the peak.
            "ignoreNullValues": "false",
        },
    }


def _of_all_containers(pod: Mapping[str, Any], server: Mapping[str, Any]) -> Object:
    """Return the resources of the server, with the CPU and memory of its sidecars added."""
    sidecars = pod.get("initContainers", [])
    if not sidecars:
        return dict(server["resources"])
    total = of_pod(pod, "requests")
    sums = {"cpu": f"{total['cpu']}m", "memory": f"{math.ceil(total['memory'] / _MIB)}Mi"}
    found: Object = dict(server["resources"])
    return found | {kind: {**found[kind], **sums} for kind in ("requests", "limits")}
