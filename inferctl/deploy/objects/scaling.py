"""How replicas follow the load: a ScaledObject of KEDA or a HorizontalPodAutoscaler, and the spare capacity.

All of it depends on the cluster: its share of the traffic, its limits, its Prometheus and its autoscaler of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from inferctl.deploy import queries
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.figure import Figure, Noted, shown
from inferctl.deploy.objects.metadata import SERVER, Object, labels_of, metadata
from inferctl.deploy.objects.policy import OVERFLOW_PRIORITY
from inferctl.deploy.plan import FlavorPlan, ModelPlan, Placement
from inferctl.deploy.queries import Link, Query
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


def scaling(model: ModelPlan, cluster: Cluster, namespace: str) -> list[Object]:
    """Return the autoscaler of each flavor that has one in `cluster`; with `scaling: hpa` also its recording rules."""
    settings = model.spec.deploy
    if settings.scaling == "none":
        return []
    chain: list[Link] = []
    made: list[Object] = []
    rules: list[Object] = []
    for flavor in model.flavors:
        chain.append(Link(flavor, flavor.at(cluster)))
        if chain[-1].placement.replicas is not None:
            continue
        found = queries.of(model, namespace, chain)
        if settings.scaling == "keda":
            made.append(scaled_object(model, chain[-1], cluster, namespace, found))
        else:
            made.append(autoscaler(model, chain[-1], cluster, namespace, found))
            rules += [_recorded(flavor, namespace, query) for query in found]
    return [*made, *([_prometheus_rule(model, namespace, rules)] if rules else [])]


def scaled_object(model: ModelPlan, link: Link, cluster: Cluster, namespace: str, found: list[Query]) -> Object:
    """Return the ScaledObject of a flavor. KEDA takes the largest of its triggers.

    KEDA's defaults hurt: a minimum of 0, a value of 0 if a query returns nothing, and 30 s between two polls.
    """
    flavor, placed = link.flavor, link.placement
    server = cluster.prometheus or model.spec.deploy.prometheus or DEFAULT_PROMETHEUS
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": metadata(
            flavor.name, namespace, labels_of(model.name, SERVER, flavor.label), _peak(model, cluster)
        ),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": flavor.name},
            "pollingInterval": _POLLING_S,
            "cooldownPeriod": _window(flavor),
            "minReplicaCount": placed.min_replicas.noted,
            "maxReplicaCount": placed.max_replicas.noted,
            "fallback": {"failureThreshold": 3, "replicas": _fallback(placed), "behavior": "currentReplicasIfHigher"},
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior(flavor)}},
            "triggers": [_trigger(server, query) for query in found],
        },
    }


def autoscaler(model: ModelPlan, link: Link, cluster: Cluster, namespace: str, found: list[Query]) -> Object:
    """Return the HorizontalPodAutoscaler of a flavor. The API of external metrics must serve the recorded series."""
    flavor, placed = link.flavor, link.placement
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(
            flavor.name, namespace, labels_of(model.name, SERVER, flavor.label), _peak(model, cluster)
        ),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": flavor.name},
            "minReplicas": placed.min_replicas.noted,
            "maxReplicas": placed.max_replicas.noted,
            "behavior": behavior(flavor),
            "metrics": [
                {
                    "type": "External",
                    "external": {
                        "metric": {
                            "name": series(query),
                            "selector": {"matchLabels": {"namespace": namespace, "deployment": flavor.name}},
                        },
                        "target": {"type": "AverageValue", "averageValue": "1"},
                    },
                }
                for query in found
            ],
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
    """Return what keeps nodes alive and empty for `flavor` in `cluster`: a CapacityBuffer or placeholder pods, or none.

    `deployment`: that of the flavor as it is in this cluster, without notes. Placeholders have its place and resources.
    """
    spare = flavor.at(cluster).overflow
    if spare is None:
        return []
    namespace = deployment["metadata"]["namespace"]
    labels = labels_of(model.name, OVERFLOW, flavor.label)
    if cluster.buffer_version:
        return [_buffer(flavor, namespace, labels, cluster.buffer_version, spare)]
    return [_placeholders(flavor, deployment, labels, spare)]


def series(query: Query) -> str:
    """Return the name of the recorded series of a query."""
    return f"inferctl_needed_replicas_{query.name}"


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


def _recorded(flavor: FlavorPlan, namespace: str, query: Query) -> Object:
    return {
        "record": series(query),
        "expr": Noted(query.promql, query.note),
        "labels": {"namespace": namespace, "deployment": flavor.name},
    }


def _prometheus_rule(model: ModelPlan, namespace: str, rules: list[Object]) -> Object:
    name = f"{model.name}-scaling"
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": metadata(name, namespace, labels_of(model.name, SERVER)),
        "spec": {"groups": [{"name": name, "interval": "15s", "rules": rules}]},
    }


def _buffer(flavor: FlavorPlan, namespace: str, labels: Mapping[str, str], version: str, spare: Figure) -> Object:
    return {
        "apiVersion": version,
        "kind": "CapacityBuffer",
        "metadata": metadata(flavor.name, namespace, labels),
        "spec": {
            "scalableRef": {"apiGroup": "apps", "kind": "Deployment", "name": flavor.name},
            # Not with `percentage`: implementations disagree which of the two counts.
            "replicas": spare.noted,
        },
    }


def _placeholders(
    flavor: FlavorPlan, deployment: Mapping[str, Any], labels: Mapping[str, str], spare: Figure
) -> Object:
    """Return a Deployment of pause pods, which keep nodes until a server with a higher priority preempts them.

    Each one requests as much as all containers of a server's pod, so that the pod fits in its place.
    """
    pod = deployment["spec"]["template"]["spec"]
    (server,) = (each for each in pod["containers"] if each["name"] == SERVER)
    affinity = {key: value for key, value in pod.get("affinity", {}).items() if key == "nodeAffinity"}
    name = f"{flavor.name}-overflow"
    template: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "priorityClassName": OVERFLOW_PRIORITY,
        "terminationGracePeriodSeconds": 0,
        "securityContext": pod["securityContext"],
        **({"affinity": affinity} if affinity else {}),
        **{key: pod[key] for key in ("tolerations", "resourceClaims") if key in pod},
        "containers": [
            {
                "name": "pause",
                "image": PAUSE_IMAGE,
                "resources": _of_all_containers(pod, server),
                "securityContext": server["securityContext"],
            }
        ],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(name, deployment["metadata"]["namespace"], labels),
        "spec": {
            "replicas": spare.noted,
            "strategy": {"type": "Recreate"},  # a surge would need GPUs beyond the quota
            "selector": {"matchLabels": dict(labels)},
            "template": {"metadata": {"labels": dict(labels)}, "spec": template},
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
