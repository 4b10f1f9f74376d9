"""The preview of clusters in which pods run already: their revision, their budgets, and nodes that are not listed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from inferctl.core.errors import UsageError
from inferctl.manifests.preview import drills, filters, nodes_file, report
from tests.manifests import kube
from tests.manifests.kube import thing
from tests.manifests.preview.expand import simulate

GPU = "nvidia.com/gpu"
ZONE = "topology.kubernetes.io/zone"
CONTAINERS = {"containers": [{"name": "main", "image": "server", "resources": {"limits": {GPU: 1}}}]}


def node(name: str, zone: str = "a", gpus: int = 8, **spec: Any) -> dict[str, Any]:
    allocatable = {"cpu": "32", "memory": "128Gi", "pods": "110", GPU: str(gpus)}
    labels = {"kubernetes.io/hostname": name, ZONE: zone}
    return thing("Node", name, spec, labels=labels, status={"allocatable": allocatable})


def pod(name: str, on: str, labels: dict[str, str], **spec: Any) -> dict[str, Any]:
    more = {"namespace": "default", "startTime": "2026-11-01T00:00:10Z"}
    return kube.running(name, on, labels, {**CONTAINERS, **spec}, **more)


def deployment(name: str, replicas: int, **pod: Any) -> dict[str, Any]:
    return kube.deployment(name, {"app": name}, {**CONTAINERS, **pod}, replicas)


def test_new_pods_are_of_the_revision_that_runs() -> None:
    """With matchLabelKeys, two running pods in zone a count, so that the third goes to zone b."""
    constraint = {
        "maxSkew": 1,
        "topologyKey": ZONE,
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "embed"}},
        "matchLabelKeys": ["pod-template-hash"],
    }
    old = pod("embed-9", "b", {"app": "embed", "pod-template-hash": "1"})
    old["status"]["startTime"] = "2026-10-01T00:00:00Z"
    running = [pod(f"embed-{n}", "a", {"app": "embed", "pod-template-hash": "2"}) for n in (1, 2)]
    nodes = [node("a", "a"), node("b", "b")]
    outcome = simulate([*nodes, old, *running], deployment("embed", 4, topologySpreadConstraints=[constraint]))
    (attempt,) = outcome.rest
    assert attempt.feasible == ["b"]
    assert attempt.pod.labels["pod-template-hash"] == "2"


def test_an_eviction_uses_up_a_budget() -> None:
    """One disruption is allowed: the second spike pod takes a node where it violates nothing, not the last victim."""
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": {"app": "batch"}}}
    status = {"disruptionsAllowed": 1}
    objects = [
        *(node(name, gpus=1) for name in ("a", "b", "c")),
        pod("batch-1", "a", {"app": "batch"}, priority=-20),
        pod("batch-2", "b", {"app": "batch"}, priority=-20),
        pod("other", "c", {"app": "other"}, priority=-10),
        thing("PodDisruptionBudget", "batch", spec, namespace="default", status=status),
    ]
    outcome = simulate(objects, deployment("embed", 2))
    assert [[victim.name for victim in attempt.evicted] for attempt in outcome.rest] == [["batch-1"], ["other"]]
    assert [attempt.candidates[0].violations for attempt in outcome.rest] == [0, 0]


def test_an_evicted_pod_may_go_to_another_node() -> None:
    """The node in the spec of a running pod is where it is, not a condition for the pod that replaces it."""
    objects = [node("a", gpus=1), node("b", gpus=1, unschedulable=True), pod("low", "a", {}, priority=-5)]
    outcome = simulate(objects, deployment("embed", 1))
    (again,) = outcome.waiting
    assert [why.plugin for why in filters.feasible(outcome.cluster, again)["b"]] == ["NodeUnschedulable"]


def test_pods_on_nodes_that_are_not_listed_do_not_wait() -> None:
    waits = thing("Pod", "waits", CONTAINERS, labels={"app": "waits"}, namespace="default", status={"phase": "Running"})
    objects = [node("a"), pod("far", "elsewhere", {"app": "far"}), waits]
    outcome = simulate(objects, deployment("embed", 1))
    (cluster,) = report.document([outcome], [])["clusters"]
    assert "1 pods are on nodes that the files do not have" in cluster["notes"]
    assert any(note.startswith("1 waiting pods of others") for note in cluster["notes"])


def test_two_files_of_one_name_are_an_error(tmp_path: Path) -> None:
    files = []
    for folder in ("berlin", "paris"):
        files.append(tmp_path / folder / "nodes.yaml")
        files[-1].parent.mkdir()
        files[-1].write_text(json.dumps(node(folder)))
    with pytest.raises(UsageError, match="both describe the cluster 'nodes'"):
        nodes_file.read(files)


def test_a_large_cluster_takes_seconds() -> None:
    """500 nodes, 2,000 pods, spread and anti-affinity: 52 pods find a node, 8 evict others, and losses are computed."""
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "other"}}}
    constraint = {"maxSkew": 5, "topologyKey": ZONE, "labelSelector": {"matchLabels": {"app": "embed"}}}
    more: dict[str, Any] = {
        "topologySpreadConstraints": [constraint],
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}},
    }
    objects = [node(f"n{number}", "abc"[number % 3], gpus=4) for number in range(500)]
    objects += [pod(f"p{number}", f"n{number % 487}", {"app": "low"}, priority=-10) for number in range(1948)]
    start = time.process_time()
    outcome = simulate(objects, deployment("embed", 60, **more))
    losses = drills.run([outcome])
    assert time.process_time() - start < 30
    assert (sum(len(each.evicted) for each in outcome.rest), len(losses) > 3) == (8, True)
