"""The filters of the scheduler, in its order: on which nodes a pod can run, and why not on the others.

Every filter is evaluated, so that one run shows all that keeps a pod away. The scheduler stops at the first one and
reports only that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from inferctl.manifests.kubernetes import fields, selectors
from inferctl.manifests.kubernetes.taints import UNSCHEDULABLE, tolerates, untolerated
from inferctl.manifests.preview import volumes
from inferctl.manifests.preview.cluster import ClusterState, Node, Pod
from inferctl.manifests.preview.topology import View, affinity_violation, spread_violation, view


@dataclass(frozen=True)
class Reason:
    """Why a node is not feasible. `plugin`: the scheduler's name of the filter.

    `resolvable`: whether evicting pods from this node may help.
    """

    plugin: str
    text: str
    resolvable: bool = False


def feasible(cluster: ClusterState, pod: Pod) -> dict[str, list[Reason]]:
    """Return, for each node, the reasons why `pod` cannot run there; none for a feasible node."""
    seen = view(pod, cluster)
    return {name: reasons(cluster, pod, name, seen) for name in cluster.nodes}


def reasons(cluster: ClusterState, pod: Pod, name: str, seen: View | None = None) -> list[Reason]:
    """Return why `pod` cannot run on the node. `seen`: the counts of other pods in the present state, if known."""
    node, seen = cluster.nodes[name], seen or view(pod, cluster)
    return [reason for each in _FILTERS for reason in each(cluster, pod, node, seen)]


def _unschedulable(cluster: ClusterState, pod: Pod, node: Node, seen: View) -> Iterator[Reason]:
    if node.unschedulable and not tolerates(pod.tolerations, UNSCHEDULABLE):
        yield Reason("NodeUnschedulable", "is cordoned")


def _taints(cluster: ClusterState, pod: Pod, node: Node, seen: View) -> Iterator[Reason]:
    if taint := untolerated(pod.tolerations, node.taints):
        yield Reason("TaintToleration", f"taint {taint} is not tolerated")


def _affinity(cluster: ClusterState, pod: Pod, node: Node, seen: View) -> Iterator[Reason]:
    if not selectors.node_matches(pod.spec, node.name, node.labels):
        yield Reason("NodeAffinity", "; or ".join(selectors.unmet(pod.spec, node.name, node.labels)))


def _resources(cluster: ClusterState, pod: Pod, node: Node, seen: View) -> Iterator[Reason]:
    most, running = node.allocatable.get("pods", 0), len(cluster.on(node.name))
    if running + 1 > most:
        yield Reason("NodeResourcesFit", f"has {running} pods of at most {most}", resolvable=most > 0)
    used = cluster.used(node.name)
    for name, amount in pod.requests.items():
        total = node.allocatable.get(name, 0)
        if amount > 0 and amount > total - used.get(name, 0):
            free = fields.show(name, max(0, total - used.get(name, 0)))
            what = f"{fields.show(name, amount)} {name} requested, {free} of {fields.show(name, total)} free"
            yield Reason("NodeResourcesFit", what if total else f"has no {name}", resolvable=amount <= total)


def _volumes(cluster: ClusterState, pod: Pod, node: Node, seen: View) -> Iterator[Reason]:
    for plugin, text in volumes.problems(cluster, pod, node):
        yield Reason(plugin, text)


def _spread(cluster: ClusterState, pod: Pod, node: Node, seen: View) -> Iterator[Reason]:
    if found := spread_violation(seen, node):
        yield Reason("PodTopologySpread", *found)


def _pods(cluster: ClusterState, pod: Pod, node: Node, seen: View) -> Iterator[Reason]:
    if found := affinity_violation(seen, node):
        yield Reason("InterPodAffinity", *found)


_FILTERS: tuple[Callable[[ClusterState, Pod, Node, View], Iterator[Reason]], ...] = (
    _unschedulable,
    _taints,
    _affinity,
    _resources,
    _volumes,
    _spread,
    _pods,
)
