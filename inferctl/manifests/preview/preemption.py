"""Which pods of lower priority the scheduler evicts for a pod that fits nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.manifests.kubernetes import fields, selectors
from inferctl.manifests.preview.cluster import ClusterState, Pod
from inferctl.manifests.preview.filters import Reason, reasons
from inferctl.manifests.preview.topology import View, is_counted, view

# Makes every priority positive, so that fewer victims always have the smaller sum.
_OFFSET = 2**31


@dataclass(frozen=True)
class Candidate:
    """A node and the pods to evict there, most important first. `violations`: victims beyond a disruption budget."""

    node: str
    victims: tuple[Pod, ...]
    violations: int


# A budget, and how many of its pods may go.
Budget = tuple[Mapping[str, Any], int]


def candidates(cluster: ClusterState, pod: Pod, found: Mapping[str, Sequence[Reason]]) -> list[Candidate]:
    """Return the nodes on which evictions make room for `pod`, best first. `found`: why each node is not feasible.

    The scheduler takes the first. With over 100 nodes it looks at a part of them only, beginning at a random one.
    """
    if not pod.preempts:
        return []
    # The scheduler sees only the first reason. If evictions cannot help there, it skips the node.
    nodes = [name for name, why in found.items() if why and why[0].resolvable]
    budgets = [(budget, _allowed(cluster, budget)) for budget in cluster.of_kind("PodDisruptionBudget")]
    seen = view(pod, cluster)
    options = [each for name in nodes if (each := _victims(cluster, pod, name, budgets, seen)) is not None]
    return sorted(options, key=_preference)


def best(cluster: ClusterState, pod: Pod, found: Mapping[str, Sequence[Reason]]) -> list[Candidate]:
    """Return the candidate that the scheduler prefers; several if it has no preference among them."""
    options = candidates(cluster, pod, found)
    return [each for each in options if _preference(each) == _preference(options[0])]


def _preference(candidate: Candidate) -> tuple[float, ...]:
    """Fewest violated budgets, lowest top priority, smallest sum of priorities, fewest victims, latest start."""
    victims = candidate.victims
    top = max(pod.priority for pod in victims)
    started = min(pod.started for pod in victims if pod.priority == top)
    return (
        candidate.violations,
        top,
        sum(pod.priority + _OFFSET for pod in victims),
        len(victims),
        -started,
    )


def _victims(cluster: ClusterState, pod: Pod, node: str, budgets: Sequence[Budget], seen: View) -> Candidate | None:
    """Return the fewest evictions that make room on `node`; None if even evicting all lower pods does not.

    All pods of lower priority are removed, then put back from the most important one while `pod` still fits. `seen`:
    the counts of other pods before that.
    """
    lower = sorted(
        (other for other in cluster.on(node) if other.priority < pod.priority),
        key=lambda other: (-other.priority, other.started),
    )
    if not lower:
        return None
    protected, others = _by_budget(budgets, lower)
    # Counting the pods of all nodes again is slow, and needed only if one that goes was counted.
    unchanged = None if any(is_counted(seen, other) for other in lower) else seen
    removed = list(lower)
    for other in lower:
        cluster.remove(other)
    try:
        if reasons(cluster, pod, node, unchanged):
            return None
        violations = 0
        for other in [*protected, *others]:
            cluster.add(other)
            removed.remove(other)
            if reasons(cluster, pod, node, unchanged):
                cluster.remove(other)
                removed.append(other)
                violations += other in protected
        victims = tuple(other for other in lower if other in removed)
        return Candidate(node, victims, violations) if victims else None
    finally:
        for other in removed:
            cluster.add(other)


def _by_budget(budgets: Sequence[Budget], pods: Sequence[Pod]) -> tuple[list[Pod], list[Pod]]:
    """Split `pods`, most important first, into those whose eviction violates a disruption budget, and the others."""
    allowed = [most for _, most in budgets]
    protected: list[Pod] = []
    others: list[Pod] = []
    for pod in pods:
        violated = False
        for index, (budget, _) in enumerate(budgets):
            selector = selectors.Selector(fields.optional(budget, "spec", "selector"))
            if fields.namespace_of(budget) != pod.namespace or selector.empty or not pod.labels:
                continue
            if not selector.matches(pod.labels):
                continue
            if pod.name in fields.mapping(budget, "status", "disruptedPods"):
                continue
            allowed[index] -= 1
            violated |= allowed[index] < 0
        (protected if violated else others).append(pod)
    return protected, others


def _allowed(cluster: ClusterState, budget: Mapping[str, Any]) -> int:
    """Return how many pods may go: what its status says, and what has changed since; without a status, what it has."""
    stated, now = fields.get(budget, "status", "disruptionsAllowed"), margin(cluster, budget)
    if isinstance(stated, int):
        now = stated + now - cluster.margins.get(fields.key_of(budget), now)
    return max(0, now)


def margin(cluster: ClusterState, budget: Mapping[str, Any]) -> int:
    """Return by how many pods with a node a budget is above its minimum, or below it."""
    selector, namespace = fields.optional(budget, "spec", "selector"), fields.namespace_of(budget)
    pods = [pod for pod in cluster.pods() if pod.namespace == namespace and selectors.matches(selector, pod.labels)]
    healthy = sum(pod.node is not None and not pod.terminating for pod in pods)
    if (least := fields.get(budget, "spec", "minAvailable")) is not None:
        return healthy - (fields.count_of(least, len(pods)) or 0)
    return healthy - (len(pods) - (fields.count_of(fields.get(budget, "spec", "maxUnavailable"), len(pods)) or 0))
