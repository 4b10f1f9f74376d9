"""Tests for spikes and drills. The expected numbers are computed by hand in the comments."""

from __future__ import annotations

from typing import Any

import pytest

from inferctl.manifests.preview import drills, report, workloads
from inferctl.manifests.preview.drills import Loss
from inferctl.manifests.preview.simulation import ClusterAtPeak
from tests.manifests import kube
from tests.manifests.kube import thing
from tests.manifests.preview.expand import simulate

SLICE = "nvidia.com/mig-3g.20gb"


def node(name: str, zone: str, slices: int = 2, region: str = "r") -> dict[str, Any]:
    place = {"topology.kubernetes.io/zone": zone, "topology.kubernetes.io/region": region}
    allocatable = {"cpu": "16", "pods": "110", SLICE: str(slices)}
    return thing("Node", name, labels={"kubernetes.io/hostname": name, **place}, status={"allocatable": allocatable})


def deployment(name: str, replicas: int | None = None, image: str = "server", **pod: Any) -> dict[str, Any]:
    figures = {"tokens-per-second": 100, "peak-tokens-per-second": 500}
    annotations = {f"inferctl.io/{key}": str(value) for key, value in figures.items()}
    labels = {"app.kubernetes.io/name": "embed", "flavor": name}
    pod = {"containers": [{"name": "main", "image": image, "resources": {"limits": {SLICE: 1}}}], **pod}
    return kube.deployment(name, labels, pod, replicas, annotations=annotations)


def scaled(name: str, least: int, most: int, peak: int | None = None) -> dict[str, Any]:
    spec = {"scaleTargetRef": {"name": name}, "minReplicaCount": least, "maxReplicaCount": most}
    annotations = {"inferctl.io/peak-tokens-per-second": str(peak)} if peak else {}
    return thing("ScaledObject", name, spec, annotations=annotations)


LOW = thing("PriorityClass", "low", value=-10)
PAUSE = "registry.k8s.io/pause:3.10@sha256:0"
FOUR = [node("a1", "a"), node("a2", "a"), node("b1", "b"), node("b2", "b")]


def lost(losses: list[Loss], place: str, model: str = "embed") -> Loss:
    (found,) = [loss for loss in losses if (loss.place, loss.model) == (place, model)]
    return found


def test_replicas_come_from_the_autoscaler() -> None:
    target = {"kind": "Deployment", "name": "hpa"}
    hpa = thing("HorizontalPodAutoscaler", "x", {"scaleTargetRef": target, "maxReplicas": 4})
    found = workloads.find(
        [deployment("keda"), scaled("keda", 2, 6), deployment("hpa"), hpa, deployment("fixed", 3), deployment("one")]
    )
    assert [(each.name, each.least, each.most) for each in found] == [
        ("keda", 2, 6), ("hpa", 1, 4), ("fixed", 3, 3), ("one", 1, 1)
    ]  # fmt: skip


def test_a_spike_evicts_placeholders_only_when_no_node_is_free() -> None:
    # 8 slices: 2 at rest, 3 placeholders; the spike to 600 / 100 = 6 takes the 3 free ones, then 1 of a placeholder.
    outcome = simulate(
        FOUR, LOW, deployment("embed"), scaled("embed", 2, 6, peak=600),
        deployment("overflow", 3, PAUSE, priorityClassName="low"),
    )  # fmt: skip
    assert [bool(attempt.evicted) for attempt in outcome.spike] == [False, False, False, True]
    assert [pod.owner for pod in outcome.spike[3].evicted] == ["overflow"]
    # The evicted placeholder finds no other slice.
    assert (len(outcome.again), len(outcome.waiting)) == (0, 1)
    (shown,) = report.document([outcome], [])["clusters"][0]["evicted"]
    assert shown == {"deployment": "overflow", "placeholder": True, "placed_again": 0, "waiting": 1}


def test_losing_a_node_or_a_zone() -> None:
    # 5 of 8 slices serve 500 of the peak of 500, with 2, 1, 1 and 1 pods on the nodes.
    losses = drills.run([simulate(FOUR, deployment("embed", 5))])
    nodes = sorted((loss.lost, loss.alike, loss.before, loss.at_once) for loss in losses if loss.scope == "node")
    assert nodes == [(1, 3, 500, 400), (2, 1, 500, 300)]
    # 6 pods, 3 in each zone: 600 of 500 is all of the peak, not more.
    loss = lost(drills.run([simulate(FOUR, deployment("embed", 6))]), "a")
    assert (loss.before, loss.at_once, loss.full, loss.demand, loss.lost) == (600, 300, 600, 500, 3)
    assert (loss.share(loss.before), loss.share(loss.at_once)) == (1, 0.6)


def test_losing_a_cluster_and_a_region() -> None:
    # Three clusters with 2, 2 and 4 replicas; two of them in region r. Peak 500 in each.
    pairs = [("one", 2, "r"), ("two", 2, "r"), ("three", 4, "s")]
    outcomes = [
        simulate([node(f"{name}-{i}", "z", 2, region) for i in range(3)], deployment("embed", count), name=name)
        for name, count, region in pairs
    ]
    losses = drills.run(outcomes)
    three = next(loss for loss in losses if (loss.scope, loss.place) == ("cluster", "three"))
    assert (three.before, three.at_once, three.lost) == (800, 400, 4)
    assert (three.demand, three.share(three.at_once)) == (1500, 400 / 1500)
    region = next(loss for loss in losses if loss.scope == "region")
    assert (region.place, region.cluster, region.lost, region.at_once) == ("r", "one, two", 4, 400)
    # A lost node concerns its cluster: 2 replicas for its peak of 500.
    first = next(loss for loss in losses if loss.scope == "node")
    assert (first.cluster, first.before, first.demand) == ("one", 200, 500)


@pytest.mark.parametrize(
    ("slow_rate", "found"),
    [
        ("50", ("tokens/s", 500, 300, 300)),  # 2 x 100 + 2 x 50: flavors of a model add up
        ("100", ("tokens/s", 500, 400, 400)),
        (None, ("tokens/s", 500, 200, 200)),  # a gateway does not count next to servers with a rate
    ],
)
def test_the_rates_of_a_model_add_up(slow_rate: str | None, found: tuple[Any, ...]) -> None:
    fast, slow = deployment("fast", 2), deployment("slow", 2)
    annotations = slow["metadata"]["annotations"]
    annotations["inferctl.io/tokens-per-second"] = slow_rate
    if slow_rate is None:
        annotations.clear()
    loss = lost(drills.run([simulate(FOUR, fast, slow)]), "a")
    assert (loss.unit, loss.demand, loss.before, loss.full) == found


def test_without_a_rate_replicas_are_counted() -> None:
    plain = deployment("embed", 4)
    del plain["metadata"]["annotations"]
    loss = lost(drills.run([simulate(FOUR, plain)]), "a")
    assert (loss.unit, loss.demand, loss.full, loss.at_once) == ("replicas", None, 4, 2)


def chain(first: int, second: int, **annotations: str) -> list[dict[str, Any]]:
    """Return two flavors of one model, at most so many pods each, for a peak of 500 tokens/s."""
    found: list[dict[str, Any]] = []
    for preference, (name, most, rate) in enumerate((("z-fast", first, "100"), ("a-slow", second, "50")), start=1):
        each = deployment(name, nodeSelector={"pool": name})
        more = {"inferctl.io/tokens-per-second": rate, "inferctl.io/preference": str(preference)}
        each["metadata"]["annotations"] |= more | {f"inferctl.io/{key}": value for key, value in annotations.items()}
        found += [each, scaled(name, 0, most)]
    # The order of the files is not that of preference.
    return found[::-1]


def pools(fast: int, slow: int) -> list[dict[str, Any]]:
    """Return two nodes of each pool, with so many slices each."""
    found = []
    for pool, slices in (("z-fast", fast), ("a-slow", slow)):
        for index in (1, 2):
            each = node(f"{pool}-{index}", "ab"[index - 1], slices)
            each["metadata"]["labels"]["pool"] = pool
            found.append(each)
    return found


def peak_of(outcome: ClusterAtPeak) -> dict[str, int]:
    counts = {each.name: 0 for each in outcome.workloads}
    for _, pod in outcome.cluster.bound():
        counts[pod.owner] += 1
    return counts


def test_the_next_flavor_serves_what_the_first_leaves() -> None:
    # 3 x 100 of 500; the second needs (500 - 300) / 50 = 4 of its 9.
    assert peak_of(simulate(pools(4, 4), *chain(3, 9))) == {"z-fast": 3, "a-slow": 4}
    # The first alone: 500 / 100 = 5.
    assert peak_of(simulate(pools(4, 4), *chain(8, 9))) == {"z-fast": 5, "a-slow": 0}
    # Planned for 80%: 500 / (0.8 x 100) = 6.25, so 7.
    assert peak_of(simulate(pools(4, 4), *chain(8, 9, utilization="0.8"))) == {"z-fast": 7, "a-slow": 0}


def test_the_next_flavor_makes_up_for_pods_that_wait() -> None:
    # Only 2 of 5 fast pods have a slice: 300 are left, 6 slow ones.
    outcome = simulate(pools(1, 4), *chain(5, 9))
    assert peak_of(outcome) == {"z-fast": 2, "a-slow": 6}
    assert sum(attempt.node is None for attempt in outcome.spike) == 3


ONE = {"containers": [{"name": "main", "resources": {"limits": {SLICE: 1}}}]}
LABELS = {"app.kubernetes.io/name": "embed", "flavor": "embed"}


def test_pods_that_run_count_as_replicas_and_stay() -> None:
    running = kube.running("embed-x-1", "b2", LABELS, ONE, namespace="default")
    waiting = thing("Pod", "embed-x-2", ONE, labels=LABELS, namespace="default", status={"phase": "Pending"})
    outcome = simulate([*FOUR, running, waiting], deployment("embed", 3))
    assert outcome.existing == {"embed": 2}
    assert [attempt.pod.name for attempt in outcome.rest] == ["embed-x-2", "embed-3"]


def test_the_result_does_not_depend_on_the_order_of_nodes() -> None:
    overflow = deployment("overflow", 3, PAUSE, priorityClassName="low")
    manifests = (LOW, deployment("embed"), scaled("embed", 2, 6), overflow)
    places = []
    for outcome in (simulate(FOUR, *manifests), simulate(FOUR[::-1], *manifests)):
        (cluster,) = report.document([outcome], drills.run([outcome]))["clusters"]
        places.append([group["nodes"] for each in cluster["deployments"] for group in each["pods"]])
    assert places[0] == places[1]
