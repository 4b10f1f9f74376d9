"""Tests for spikes and drills. The expected numbers are computed by hand in the comments."""

from __future__ import annotations

from typing import Any

import pytest

from inferctl.manifests.manifests_file import Located
from inferctl.manifests.preview import drills, nodes_file, report, simulation, workloads
from inferctl.manifests.preview.drills import Loss
from inferctl.manifests.preview.simulation import ClusterAtPeak
from tests.manifests import kube
from tests.manifests.kube import thing

SLICE = "nvidia.com/mig-3g.20gb"


def node(name: str, zone: str, slices: int = 2, region: str = "r") -> dict[str, Any]:
    place = {"topology.kubernetes.io/zone": zone, "topology.kubernetes.io/region": region}
    allocatable = {"cpu": "16", "pods": "110", SLICE: str(slices)}
    return thing("Node", name, labels={"kubernetes.io/hostname": name, **place}, status={"allocatable": allocatable})


def deployment(name: str, replicas: int | None = None, image: str = "server", **pod: Any) -> dict[str, Any]:
    figures = {"tokens-per-second": 100, "peak-tokens-per-second": 500, "load-seconds": 45, "cold-start-seconds": 240}
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


def simulate(nodes: list[dict[str, Any]], *manifests: dict[str, Any], name: str = "cluster") -> ClusterAtPeak:
    cluster = nodes_file.of_objects(name, [Located(each) for each in [*nodes, *manifests]])
    return simulation.run(cluster, workloads.find(manifests))


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


def test_an_evicted_pod_may_fit_elsewhere() -> None:
    # The server fits only on a1, where the placeholder is; the placeholder fits on b1 too.
    nodes = [node("a1", "a", 1), node("b1", "b", 1)]
    nodes[0]["metadata"]["labels"]["pool"] = "server"
    outcome = simulate(
        nodes, LOW, deployment("embed", nodeSelector={"pool": "server"}), scaled("embed", 0, 1),
        deployment("overflow", 1, PAUSE, priorityClassName="low"),
    )  # fmt: skip
    assert [(pod.owner, pod.node) for pod in outcome.again] == [("overflow", "b1")]


def test_losing_a_node_with_free_slices_elsewhere() -> None:
    # 5 of 8 slices serve 500 of the peak of 500. A node with 1 pod: 400 at once; its pod fits elsewhere.
    outcome = simulate(FOUR, deployment("embed", 5))
    losses = drills.run([outcome])
    worst = max((loss for loss in losses if loss.scope == "node"), key=lambda loss: loss.lost)
    assert worst.lost == 2  # 5 pods on 4 nodes: 2, 1, 1, 1
    assert (worst.before, worst.at_once, worst.later, worst.demand) == (500, 300, 500, 500)
    assert (worst.share(worst.at_once), worst.moved, worst.waiting) == (0.6, 2, 0)
    # 50 s until the node counts as lost, 300 s until its pods are evicted, 45 s to load.
    assert (worst.later_s, worst.recovered_s) == (395, 395)


def test_losing_a_zone_leaves_pods_waiting() -> None:
    # 6 pods, 3 in each zone of 4 slices: zone b has room for 1 of the 3 of zone a. The others need a new node.
    losses = drills.run([simulate(FOUR, deployment("embed", 6))])
    loss = lost(losses, "a")
    assert (loss.before, loss.at_once, loss.later, loss.full) == (600, 300, 400, 600)
    assert (loss.lost, loss.moved, loss.waiting) == (3, 1, 2)
    assert dict(loss.why) == {"NodeResourcesFit on 2 nodes": 2}
    # 50 + 300 + 240 s of a cold start.
    assert (loss.later_s, loss.recovered_s) == (395, 590)
    # 600 of 500 is all of the peak, not more.
    assert (loss.share(loss.before), loss.share(loss.at_once), loss.share(loss.later)) == (1, 0.6, 0.8)


def test_placeholders_absorb_a_lost_node() -> None:
    # 6 servers and 2 placeholders fill 8 slices. A lost node with 2 servers evicts the 2 placeholders elsewhere.
    outcome = simulate(FOUR, LOW, deployment("embed", 6), deployment("overflow", 2, PAUSE, priorityClassName="low"))
    losses = [loss for loss in drills.run([outcome]) if loss.scope == "node" and loss.lost == 2]
    assert losses
    for loss in losses:
        on_node = sum(pod.owner == "overflow" for pod in outcome.cluster.on(loss.place))
        assert (loss.moved, loss.evicted) == (2, 2)
        assert on_node == 0
        assert loss.later == loss.before


def test_a_drill_does_not_change_the_outcome() -> None:
    outcome = simulate(FOUR, deployment("embed", 6))
    before = sorted((pod.name, pod.node) for pod in outcome.cluster.pods())
    assert drills.run([outcome]) == drills.run([outcome])
    assert sorted((pod.name, pod.node) for pod in outcome.cluster.pods()) == before


def test_a_short_toleration_recovers_earlier_and_an_endless_one_never() -> None:
    def toleration(**more: Any) -> dict[str, Any]:
        return {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", **more}

    short = drills.run([simulate(FOUR, deployment("embed", 2, tolerations=[toleration(tolerationSeconds=10)]))])
    assert {loss.later_s for loss in short if loss.scope == "node"} == {50 + 10 + 45}
    endless = drills.run([simulate(FOUR, deployment("embed", 2, tolerations=[toleration()]))])
    assert {loss.later_s for loss in endless} == {None}


def test_a_lost_zone_with_a_hard_spread_blocks_the_other_zone() -> None:
    # The lost zone stays a domain with 0 pods. With maxSkew 1, zone b may have 1, but it has 2: the lost pods wait,
    # though it has room. With nodeTaintsPolicy Honor, the unreachable nodes are no domain.
    def spread(policy: str) -> dict[str, Any]:
        constraint = {
            "maxSkew": 1,
            "topologyKey": "topology.kubernetes.io/zone",
            "whenUnsatisfiable": "DoNotSchedule",
            "nodeTaintsPolicy": policy,
            "labelSelector": {"matchLabels": {"flavor": "embed"}},
        }
        return deployment("embed", 4, topologySpreadConstraints=[constraint])

    blocked = lost(drills.run([simulate(FOUR, spread("Ignore"))]), "a")
    assert (blocked.lost, blocked.moved, dict(blocked.why)) == (2, 0, {"PodTopologySpread on 2 nodes": 2})
    free = lost(drills.run([simulate(FOUR, spread("Honor"))]), "a")
    assert (free.lost, free.moved) == (2, 2)


def test_losing_a_cluster_and_a_region() -> None:
    # Three clusters with 2, 2 and 4 replicas; two of them in region r. Peak 500 in each.
    pairs = [("one", 2, "r"), ("two", 2, "r"), ("three", 4, "s")]
    outcomes = [
        simulate([node(f"{name}-{i}", "z", 2, region) for i in range(3)], deployment("embed", count), name=name)
        for name, count, region in pairs
    ]
    losses = drills.run(outcomes)
    three = next(loss for loss in losses if (loss.scope, loss.place) == ("cluster", "three"))
    assert (three.before, three.at_once, three.later, three.recovered_s) == (800, 400, 400, None)
    assert (three.demand, three.share(three.at_once)) == (1500, 400 / 1500)
    region = next(loss for loss in losses if loss.scope == "region")
    assert (region.place, region.cluster, region.lost, region.at_once) == ("r", "one, two", 4, 400)
    # A lost node concerns its cluster: 2 replicas for its peak of 500.
    first = next(loss for loss in losses if loss.scope == "node")
    assert (first.cluster, first.before, first.demand) == ("one", 200, 500)


def test_the_other_clusters_take_over_the_traffic_of_a_lost_one() -> None:
    # Each serves its peak of 300 with 3 of at most 6 pods. Without one, the other must serve 600 with 6.
    manifests = [deployment("embed"), scaled("embed", 0, 6, peak=300)]
    outcomes = [simulate(FOUR, *manifests, name=name) for name in ("one", "two")]
    loss = next(each for each in drills.run(outcomes) if (each.scope, each.place) == ("cluster", "one"))
    assert (loss.demand, loss.before, loss.at_once, loss.covered) == (600, 600, 300, 600)
    assert (loss.added, loss.waiting) == (3, 0)
    # 30 s until the autoscaler adds pods, 45 s to load.
    assert loss.covered_s == 75


def test_the_other_clusters_may_have_too_few_nodes() -> None:
    # The other cluster has 4 slices: 1 of the 3 more pods fits, 2 wait for nodes: 30 s + a cold start of 240 s.
    manifests = [deployment("embed"), scaled("embed", 0, 6, peak=300)]
    outcomes = [simulate(nodes, *manifests, name=name) for name, nodes in (("one", FOUR), ("two", FOUR[:2]))]
    loss = next(each for each in drills.run(outcomes) if (each.scope, each.place) == ("cluster", "one"))
    assert (loss.added, loss.waiting, loss.covered, loss.recovered_s) == (1, 2, 400, 270)


def test_without_a_rate_replicas_are_counted() -> None:
    plain = deployment("embed", 4)
    del plain["metadata"]["annotations"]
    loss = lost(drills.run([simulate(FOUR, plain)]), "a")
    assert (loss.unit, loss.demand, loss.full, loss.at_once) == ("replicas", None, 4, 2)
    assert (loss.later, loss.later_s) == (4, None)


def test_flavors_of_a_model_add_up() -> None:
    fast, slow = deployment("fast", 2), deployment("slow", 2)
    slow["metadata"]["annotations"]["inferctl.io/tokens-per-second"] = "50"
    loss = lost(drills.run([simulate(FOUR, fast, slow)]), "a")
    assert (loss.before, loss.full) == (300, 300)


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


def test_after_a_loss_the_next_flavor_fills_in() -> None:
    # 5 fast pods on 2 nodes of 3 slices: 3 in zone a, 2 in zone b. Zone a is lost: 1 fits in b, 2 wait. They leave
    # 500 - 300 = 200, so 4 slow pods, which fit in zone b.
    losses = drills.run([simulate(pools(3, 4), *chain(5, 9))])
    loss = lost(losses, "a")
    assert (loss.lost, loss.moved, loss.waiting, loss.added) == (3, 1, 2, 4)
    assert (loss.before, loss.at_once, loss.later, loss.covered) == (500, 200, 300, 500)
    # 50 s until the node is lost, 240 s (cold start) until the hardware is missing, 30 s to notice, 45 s to load.
    # The pod that moves is ready later: 50 s + 300 s + 45 s.
    assert loss.covered_s == max(50 + 240 + 30 + 45, 395)


def test_pods_that_are_added_count_only_for_their_model() -> None:
    chat = deployment("chat", 1, nodeSelector={"pool": "chat"})
    chat["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"] = "chat"
    chat["metadata"]["annotations"]["inferctl.io/peak-tokens-per-second"] = "100"
    nodes = pools(3, 4)
    for index, zone in enumerate("ab"):
        nodes.append(node(f"chat-{index}", zone, 1))
        nodes[-1]["metadata"]["labels"]["pool"] = "chat"
    losses = drills.run([simulate(nodes, chat, *chain(5, 9))])
    # As above; the one pod of the other model moves to its node in zone b, and none is added.
    assert lost(losses, "a").added == 4
    assert (lost(losses, "a", "chat").moved, lost(losses, "a", "chat").added) == (1, 0)


def test_a_loss_is_over_when_the_slowest_pod_is_ready() -> None:
    slow = deployment("slow", 1)
    slow["metadata"]["annotations"]["inferctl.io/load-seconds"] = "90"
    loss = lost(drills.run([simulate(FOUR, deployment("embed", 1), slow)]), "a")
    # Both pods are in zone a. 50 s until the nodes are lost, 300 s until the pods are evicted, and the longer load.
    assert (loss.moved, loss.later_s) == (2, 50 + 300 + 90)


def test_the_next_flavor_alone_is_ready_earlier_than_evicted_pods() -> None:
    # 4 fast pods serve a peak of 400. Zone a is lost with 2 of them, which fit nowhere: 4 slow pods start in zone b.
    peak = {"peak-tokens-per-second": "400"}
    loss = lost(drills.run([simulate(pools(2, 5), *chain(4, 9, **peak))]), "a")
    assert (loss.moved, loss.waiting, loss.covered) == (0, 2, loss.before)
    assert loss.covered_s == 50 + 240 + 30 + 45


def test_gateways_do_not_count_next_to_servers_with_a_rate() -> None:
    gateway = deployment("gateway", 1)
    del gateway["metadata"]["annotations"]
    losses = drills.run([simulate(FOUR, deployment("embed", 4), gateway)])
    assert {loss.unit for loss in losses} == {"tokens/s"}
    assert {loss.before for loss in losses} == {400}


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


@pytest.mark.parametrize(("image", "placeholder"), [(PAUSE, True), ("server:1", False)])
def test_placeholders_are_known_by_their_image(image: str, placeholder: bool) -> None:
    (found,) = workloads.find([deployment("x", image=image)])
    assert found.placeholder is placeholder
