"""Runs the cases of `cases/`, written from the published rules of Kubernetes before the code."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from inferctl.manifests.manifests_file import Located
from inferctl.manifests.preview import admission, filters, nodes_file, preemption, simulation, workloads
from inferctl.manifests.preview.cluster import ClusterState, Pod
from tests.manifests import kube
from tests.manifests.preview import expand

CASES = expand.load()


def build(case: dict[str, Any]) -> ClusterState:
    return nodes_file.of_objects("cluster", [Located(each) for each in expand.cluster_objects(case)])


def incoming(case: dict[str, Any], cluster: ClusterState) -> Pod:
    item = expand.pod(case["pod"])
    return nodes_file.pod_of(cluster.objects, item)


def test_each_case_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(case["name"] for _, case in CASES).items() if count > 1] == []


@pytest.mark.parametrize(("file", "case"), CASES, ids=[f"{file}: {case['name']}" for file, case in CASES])
def test_case(file: str, case: dict[str, Any]) -> None:
    cluster = build(case)
    if "replicas" in case:
        check_replicas(case, cluster)
        return
    pod = incoming(case, cluster)
    refused = admission.refusal(cluster, pod)
    if "refused" in case:
        assert refused and case["refused"] in refused
        return
    assert refused is None
    cluster.add(pod)
    before = snapshot(cluster)
    found = filters.feasible(cluster, pod)
    feasible = sorted(name for name, why in found.items() if not why)
    if "feasible" in case:
        assert feasible == sorted(case["feasible"]), case["why"]
    for node, plugin in case.get("first", {}).items():
        assert found[node][0].plugin == plugin
    if "preempts" in case:
        check_preemption(case, cluster, pod, found, feasible)
    assert snapshot(cluster) == before


def check_preemption(
    case: dict[str, Any], cluster: ClusterState, pod: Pod, found: dict[str, list[filters.Reason]], feasible: list[str]
) -> None:
    best = [] if feasible else preemption.best(cluster, pod, found)
    if case["preempts"] == "none":
        assert best == [], case["why"]
        return
    assert [each.node for each in best] == [case["preempts"]["node"]], case["why"]
    assert sorted(victim.name for victim in best[0].victims) == case["preempts"]["victims"], case["why"]


def check_replicas(case: dict[str, Any], cluster: ClusterState) -> None:
    item = expand.pod(case["pod"])
    labels = item["metadata"]["labels"]
    deployment = kube.deployment("incoming", labels, item["spec"], case["replicas"], namespace="default")
    deployment["spec"]["selector"] = {"matchLabels": labels or {"app": "incoming"}}
    outcome = simulation.run(cluster, workloads.find([deployment]))
    placed = [attempt.node for attempt in outcome.rest if attempt.node]
    assert len(placed) == case["placed"], case["why"]
    for key, expected in case.get("domains", {}).items():
        counts = Counter(cluster.nodes[name].labels[key] for name in placed)
        assert dict(counts) == expected, case["why"]
    if "evicted" in case:
        assert sum(len(attempt.evicted) for attempt in outcome.rest) == case["evicted"]


def snapshot(cluster: ClusterState) -> list[tuple[str, str | None, int]]:
    """Return the state, which a question must not change."""
    return sorted((pod.name, pod.node, id(pod)) for pod in cluster.pods())
