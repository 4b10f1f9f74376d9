"""Karmada: one control plane that divides the replicas of each flavor among the clusters that can run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inferctl.core.errors import UsageError
from inferctl.deploy import manifest
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.figure import Noted
from inferctl.deploy.objects import sharing, workload
from inferctl.deploy.objects.metadata import Object, metadata
from inferctl.deploy.plan import FlavorPlan, ModelPlan, Plan

_POLICIES = "policy.karmada.io/v1alpha1"
# Kinds of the whole cluster. Karmada copies namespaces on its own.
_CLUSTER_KINDS = ("PriorityClass",)


def check(model: ModelPlan) -> None:
    """Raise `UsageError` if an autoscaler in each cluster would contradict the replicas that Karmada divides."""
    deploy = model.spec.deploy
    if deploy.karmada and deploy.scaling != "none":
        raise UsageError(
            f"{model.spec.name}: Karmada divides the replicas among the clusters, and scaling: {deploy.scaling} sets "
            "them in each cluster",
            "set deploy.scaling: none, or remove karmada and apply one overlay per cluster",
        )


def policies(plan: Plan, objects: Sequence[Mapping[str, Any]]) -> list[Object]:
    """Return what propagates `objects` to the clusters, and what differs in each cluster."""
    names = [cluster.name for cluster in plan.clusters]
    everywhere: Object = {"clusterAffinity": {"clusterNames": names}}
    flavors = {flavor.name: (model, flavor) for model in plan.models for flavor in model.flavors}
    copied = [each for each in objects if each["metadata"]["name"] not in flavors or each["kind"] != "Deployment"]
    found = []
    for kind, scope in (("ClusterPropagationPolicy", None), ("PropagationPolicy", plan.namespace)):
        wanted = [
            _selector(each)
            for each in copied
            if each["kind"] != "Namespace" and (each["kind"] in _CLUSTER_KINDS) == (scope is None)
        ]
        if wanted:
            placement = {**everywhere, "replicaScheduling": {"replicaSchedulingType": "Duplicated"}}
            found.append(_policy(kind, "inferctl", scope, {"resourceSelectors": wanted, "placement": placement}))
    for model, flavor in flavors.values():
        found.append(_divided(flavor, plan))
        if rules := [rule for cluster in plan.clusters if (rule := _override(model, flavor, cluster))]:
            selector = [{"apiVersion": "apps/v1", "kind": "Deployment", "name": flavor.name}]
            spec = {"resourceSelectors": selector, "overrideRules": rules}
            found.append(_policy("OverridePolicy", flavor.name, plan.namespace, spec))
    return found


def replicas(plan: Plan) -> list[Object]:
    """Return patches with the replicas of each flavor in all clusters together."""
    found = []
    for model in plan.models:
        for flavor in model.flavors:
            counts = [(placed.cluster, int(placed.replicas.value)) for placed in flavor.placements if placed.replicas]
            note = " + ".join(f"{count} in {cluster}" for cluster, count in counts)
            name = {"name": flavor.name, "namespace": plan.namespace}
            spec = {"replicas": Noted(sum(count for _, count in counts), note)}
            found.append({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": name, "spec": spec})
    return found


def _divided(flavor: FlavorPlan, plan: Plan) -> Object:
    """Return the policy of a Deployment, whose replicas go where GPUs are free."""
    able = [cluster.name for cluster in plan.clusters if flavor.at(cluster).max_replicas.value]
    scheduling = {
        "replicaSchedulingType": "Divided",
        "replicaDivisionPreference": "Weighted",
        "weightPreference": {"dynamicWeight": "AvailableReplicas"},
    }
    spec = {
        "resourceSelectors": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": flavor.name}],
        "placement": {"clusterAffinity": {"clusterNames": able}, "replicaScheduling": scheduling},
    }
    return _policy("PropagationPolicy", flavor.name, plan.namespace, spec)


def _override(model: ModelPlan, flavor: FlavorPlan, cluster: Cluster) -> Object | None:
    """Return the GPU resource and the node labels of a flavor in `cluster`, if they differ from those of the base."""
    placed = flavor.at(cluster)
    resource, labels = placed.resource, placed.resource.labels if placed.resource else placed.node_labels
    if resource == flavor.resource and not placed.node_labels:
        return None
    affinity = sharing.node_affinity(labels)["nodeAffinity"]
    # `add` also replaces a value that exists.
    changes = [{"path": "/spec/template/spec/affinity/nodeAffinity", "operator": "add", "value": affinity}]
    if resource and flavor.sharing != "dra":
        (server,) = workload.pod(model, flavor.only_at(cluster))["containers"]
        path = "/spec/template/spec/containers/0/resources"
        changes.append({"path": path, "operator": "replace", "value": manifest.plain(server["resources"])})
    return {"targetCluster": {"clusterNames": [cluster.name]}, "overriders": {"plaintext": changes}}


def _selector(found: Mapping[str, Any]) -> Object:
    return {"apiVersion": found["apiVersion"], "kind": found["kind"], "name": found["metadata"]["name"]}


def _policy(kind: str, name: str, namespace: str | None, spec: Object) -> Object:
    return {"apiVersion": _POLICIES, "kind": kind, "metadata": metadata(name, namespace, {}), "spec": spec}
