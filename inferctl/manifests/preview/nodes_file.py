"""Reads the nodes of clusters, their pods and quotas: what `kubectl get -o yaml` prints, or a short form by hand."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inferctl.core import document
from inferctl.core.errors import Problem, SpecError, UsageError
from inferctl.manifests import manifests_file
from inferctl.manifests.kubernetes import fields, taints
from inferctl.manifests.manifests_file import Located
from inferctl.manifests.preview import admission, node_groups, preemption
from inferctl.manifests.preview.cluster import ClusterState, Node, Pod

_FINISHED = ("Succeeded", "Failed")
_SMALLER = (
    f"save it with `-o json` (up to {document.MAX_JSON_BYTES:,} bytes), or without finished pods: "
    "`kubectl get pods -A --field-selector=status.phase!=Succeeded,status.phase!=Failed`"
)
# Kinds that the filters, admission and the notes of the report read.
_READ = (
    "CapacityBuffer",
    "CronJob",
    "DaemonSet",
    "LeaderWorkerSet",
    "Namespace",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "PodDisruptionBudget",
    "PriorityClass",
    "ResourceQuota",
    "ReplicaSet",
    "RuntimeClass",
    "StatefulSet",
)


def read(
    paths: Sequence[Path], manifests: Mapping[str, Sequence[Located]] | Sequence[Located] = ()
) -> list[ClusterState]:
    """Return the clusters of nodes files.

    The nodes of a group in the short form belong to the cluster that it names, everything else to the cluster named as
    its file. If a file has only one cluster, its objects belong to that. `manifests`: what will be applied, in all
    clusters or by the name of the cluster; its priority classes, quotas and budgets count as well.

    Raises `UsageError` and `SpecError`.
    """
    found: dict[str, list[Located]] = {}
    files: dict[str, Path] = {}
    for path in paths:
        for name, objects in _file(path).items():
            found.setdefault(name, []).extend(objects)
            if name == path.stem and files.setdefault(name, path) != path:
                raise UsageError(
                    f"{files[name]} and {path} both describe the cluster {name!r}",
                    "give each file the name of its cluster",
                )
    clusters = []
    for name, objects in found.items():
        own = manifests.get(name, ()) if isinstance(manifests, Mapping) else manifests
        clusters.append(of_objects(name, [*objects, *(each for each in own if each.kind in _READ)]))
    return [cluster for cluster in clusters if cluster.nodes or len(clusters) == 1]


def _file(path: Path) -> dict[str, list[Located]]:
    groups: dict[str, list[Located]] = {}
    others: list[Located] = []
    for each in document.read_cluster(path, node_groups.EXAMPLE, _SMALLER):
        if "kind" in each.data or "apiVersion" in each.data:
            others += manifests_file.objects_of(each)
        else:
            for cluster, node in node_groups.read(each):
                groups.setdefault(cluster, []).append(Located(node, each.file))
    if not groups and not any(each.kind == "Node" for each in others):
        raise UsageError(f"{path} has no nodes", node_groups.EXAMPLE)
    name = next(iter(groups)) if len(groups) == 1 else path.stem
    if others and (len(groups) <= 1 or any(each.kind == "Node" for each in others)):
        groups.setdefault(name, []).extend(others)
    else:
        # Objects next to the nodes of several clusters, such as quotas, are in all of them.
        for objects in groups.values():
            objects += others
    return groups


def of_objects(name: str, located: Sequence[Located]) -> ClusterState:
    """Return a cluster of Kubernetes objects: nodes, pods and what limits them. Raises `SpecError`."""
    objects: dict[str, list[Mapping[str, Any]]] = {}
    for each in located:
        if each.kind in _READ:
            # The same object in the cluster and in the manifests: the manifests come later and win.
            same = [o for o in objects.get(each.kind, []) if fields.key_of(o) != fields.key_of(each.data)]
            objects[each.kind] = [*same, _with_status(each.data, objects.get(each.kind, []))]
    cluster = ClusterState(name, {}, objects)
    nodes = [each for each in located if each.kind == "Node"]
    pods = [
        each for each in located if each.kind == "Pod" and fields.text(each.data, "status", "phase") not in _FINISHED
    ]
    problems = []
    for each in nodes:
        try:
            node = _node(each.data)
        except ValueError as error:
            problems.append(Problem("status.allocatable", f"node {each.name}: {error}", each.line(("status",))))
            continue
        cluster.nodes[node.name] = node
    for each in pods:
        try:
            cluster.add(pod_of(objects, each.data))
        except ValueError as error:
            problems.append(Problem("spec", f"pod {each.name}: {error}", each.line(("spec",))))
    if problems:
        raise SpecError(located[0].file, problems)
    for quota in cluster.of_kind("ResourceQuota"):
        try:
            admission.hard_limits(quota)
        except ValueError as error:
            name = fields.text(quota, "metadata", "name")
            raise SpecError(located[0].file, [Problem("spec.hard", f"quota {name}: {error}")]) from None
    for budget in cluster.of_kind("PodDisruptionBudget"):
        cluster.margins[fields.key_of(budget)] = preemption.margin(cluster, budget)
    return cluster


def _with_status(item: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return `item` with the status that the cluster has for it: manifests have none."""
    known = next((o for o in earlier if fields.key_of(o) == fields.key_of(item)), {})
    return item if "status" in item or "status" not in known else {**item, "status": known["status"]}


def _node(item: Mapping[str, Any]) -> Node:
    spec = fields.mapping(item, "spec")
    return Node(
        fields.text(item, "metadata", "name"),
        fields.text_map(fields.mapping(item, "metadata", "labels")),
        taints.of_node(spec),
        spec.get("unschedulable") is True,
        fields.amounts(fields.mapping(item, "status", "allocatable")),
    )


def pod_of(objects: Mapping[str, Sequence[Mapping[str, Any]]], item: Mapping[str, Any]) -> Pod:
    """Return the pod of a Pod object. `objects`: priority classes and runtime classes. Raises `ValueError`."""
    metadata, spec = (fields.mapping(item, key) for key in ("metadata", "spec"))
    pod = admission.admitted(
        objects,
        fields.namespace_of(item),
        fields.text(metadata, "name") or fields.text(metadata, "generateName"),
        fields.text_map(fields.mapping(metadata, "labels")),
        # The node that the scheduler chose does not bind the pod that replaces this one.
        {key: value for key, value in spec.items() if key != "nodeName"},
    )
    pod.node = fields.text(spec, "nodeName") or None
    pod.started = _seconds(fields.text(item, "status", "startTime"))
    pod.terminating = bool(metadata.get("deletionTimestamp"))
    return pod


def _seconds(time: str) -> float:
    """Return a time in seconds since 1970. A pod without a start time counts as started now, later than all others."""
    try:
        return datetime.datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return math.inf
