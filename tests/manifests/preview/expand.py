"""Turns the short cases of `cases/` into plain Kubernetes objects, which a real API server accepts too."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from inferctl.manifests.manifests_file import Located
from inferctl.manifests.preview import nodes_file, simulation, workloads
from inferctl.manifests.preview.simulation import ClusterAtPeak
from tests.manifests import kube

CASES = Path(__file__).parent / "cases"
ZONE = "topology.kubernetes.io/zone"
_START = datetime(2026, 11, 1, tzinfo=UTC)
_SELECTOR = {"labelSelector": {"matchLabels": {"app": "embed"}}}
_SPREAD = {"maxSkew": 1, "topologyKey": ZONE, "whenUnsatisfiable": "DoNotSchedule", **_SELECTOR}
_TERM = {"topologyKey": "kubernetes.io/hostname", **_SELECTOR}
_ALLOCATABLE = {"cpu": "8", "memory": "32Gi", "ephemeral-storage": "100Gi", "pods": "110"}


def load() -> list[tuple[str, dict[str, Any]]]:
    """Return (file, case) for every case."""
    found = []
    for file in sorted(CASES.glob("*.yaml")):
        found += [(file.stem, case) for case in yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)["cases"]]
    return found


def cluster_objects(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects that exist before the pod is scheduled."""
    nodes = [node(each) for each in case.get("nodes", [])]
    return [*nodes, *case.get("objects", []), *(pod(each) for each in case.get("pods", []))]


def node(short: dict[str, Any]) -> dict[str, Any]:
    labels = {"kubernetes.io/hostname": short["name"], **short.get("labels", {})}
    if "zone" in short:
        labels[ZONE] = short["zone"]
    allocatable = {**_ALLOCATABLE, **{name: str(value) for name, value in short.get("allocatable", {}).items()}}
    capacity = {**allocatable, **{name: str(value) for name, value in short.get("capacity", {}).items()}}
    spec: dict[str, Any] = {"taints": [taint(each) for each in short.get("taints", [])]}
    if short.get("unschedulable"):
        spec["unschedulable"] = True
    status = {"allocatable": allocatable, "capacity": capacity}
    return kube.thing("Node", short["name"], spec, labels=labels, status=status)


def taint(text: str) -> dict[str, str]:
    pair, _, effect = text.rpartition(":")
    key, _, value = pair.partition("=")
    return {"key": key, "effect": effect, **({"value": value} if value else {})}


def pod(short: dict[str, Any], name: str = "incoming") -> dict[str, Any]:
    spec = {"containers": [container(short)], **short.get("spec", {})}
    if "affinity" in short:
        selector = {"nodeSelectorTerms": [{"matchExpressions": short["affinity"]}]}
        required = {"requiredDuringSchedulingIgnoredDuringExecution": selector}
        spec["affinity"] = {**spec.get("affinity", {}), "nodeAffinity": required}
    for key, kind in (("near", "podAffinity"), ("apart", "podAntiAffinity")):
        if key in short:
            terms = {"requiredDuringSchedulingIgnoredDuringExecution": _filled(short[key], _TERM)}
            spec["affinity"] = {**spec.get("affinity", {}), kind: terms}
    if "spread" in short:
        spec["topologySpreadConstraints"] = _filled(short["spread"], _SPREAD)
    for key, target in (("node", "nodeName"), ("priority", "priority"), ("class", "priorityClassName")):
        if key in short:
            spec[target] = short[key]
    metadata: dict[str, Any] = {
        "name": short.get("name", name),
        "namespace": short.get("namespace", "default"),
        "labels": short.get("labels", {}),
    }
    running = "Running" if "node" in short else "Pending"
    status: dict[str, Any] = {"phase": short.get("phase", running)}
    if "node" in short:
        status["startTime"] = stamp(short.get("started", 0))
    if short.get("terminating"):
        metadata["deletionTimestamp"] = stamp(3600)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}


def _filled(items: list[dict[str, Any]], defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the items with the defaults they do not name; a null means that the field is not set."""
    return [{key: value for key, value in {**defaults, **item}.items() if value is not None} for item in items]


def container(short: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": "main", "image": "registry.example.com/server:1"}
    resources = {kind: short[kind] for kind in ("requests", "limits") if kind in short}
    if resources:
        found["resources"] = resources
    return found


def simulate(objects: list[dict[str, Any]], *manifests: dict[str, Any], name: str = "cluster") -> ClusterAtPeak:
    """Return what becomes of the manifests in a cluster, which has their priority classes and the like too."""
    cluster = nodes_file.of_objects(name, [Located(each) for each in [*objects, *manifests]])
    return simulation.run(cluster, workloads.find(manifests))


def stamp(seconds: int) -> str:
    return (_START + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
