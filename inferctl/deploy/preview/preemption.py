"""Which pods of lower priority the scheduler evicts for a pod that fits nowhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.deploy.preview import fields, selectors
from inferctl.deploy.preview.admission import namespace_of
from inferctl.deploy.preview.cluster import Cluster, Pod
from inferctl.deploy.preview.filters import Reason, reasons

# Makes every priority positive, so that fewer victims always have the smaller sum.
_OFFSET = 2**31


@dataclass(frozen=True)
class Candidate:
    """A node and the pods to evict there, most important first. `violations`: victims beyond a disruption budget."""

    node: str
    victims: tuple[Pod, ...]
    violations: int


def ineligible(cluster: Cluster, pod: Pod) -> str | None:
    """Return why `pod` may not preempt at all; None if it may."""
    if not pod.preempts:
        return "preemptionPolicy is Never"
    if pod.nominated in cluster.nodes and any(
        other.preempted and other.priority < pod.priority for other in cluster.on(str(pod.nominated))
    ):
        return f"waits for pods that terminate on {pod.nominated}"
    return None


def candidates(cluster: Cluster, pod: Pod, found: Mapping[str, Sequence[Reason]]) -> list[Candidate]:
    """Return the nodes on which evictions make room for `pod`, best first. `found`: why each node is not feasible.

    The scheduler takes the first. With over 100 nodes it looks at a part of them only, beginning at a random one.
    """
    if ineligible(cluster, pod):
        return []
    # The scheduler sees only the first reason. If evictions cannot help there, it skips the node.
    nodes = [name for name, why in found.items() if why and why[0].resolvable]
    options = [each for name in nodes if (each := _victims(cluster, pod, name)) is not None]
    return sorted(options, key=_preference)


def best(cluster: Cluster, pod: Pod, found: Mapping[str, Sequence[Reason]]) -> list[Candidate]:
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


def _victims(cluster: Cluster, pod: Pod, node: str) -> Candidate | None:
    """Return the fewest evictions that make room on `node`; None if even evicting all lower pods does not.

    All pods of lower priority are removed, then put back from the most important one while `pod` still fits.
    """
    lower = sorted(
        (other for other in cluster.on(node) if other.priority < pod.priority),
        key=lambda other: (-other.priority, other.started),
    )
    if not lower:
        return None
    protected, others = _by_budget(cluster, lower)
    removed = list(lower)
    for other in lower:
        cluster.remove(other)
    try:
        if reasons(cluster, pod, node):
            return None
        violations = 0
        for other in [*protected, *others]:
            cluster.add(other)
            removed.remove(other)
            if reasons(cluster, pod, node):
                cluster.remove(other)
                removed.append(other)
                violations += other in protected
        victims = tuple(other for other in lower if other in removed)
        return Candidate(node, victims, violations) if victims else None
    finally:
        for other in removed:
            cluster.add(other)


def _by_budget(cluster: Cluster, pods: Sequence[Pod]) -> tuple[list[Pod], list[Pod]]:
    """Split `pods`, most important first, into those whose eviction violates a disruption budget, and the others."""
    budgets = cluster.of_kind("PodDisruptionBudget")
    allowed = [_allowed(cluster, budget) for budget in budgets]
    protected: list[Pod] = []
    others: list[Pod] = []
    for pod in pods:
        violated = False
        for index, budget in enumerate(budgets):
            selector = fields.get(budget, "spec", "selector")
            if namespace_of(budget) != pod.namespace or selectors.is_empty(selector) or not pod.labels:
                continue
            if not selectors.matches(selector, pod.labels):
                continue
            if pod.name in fields.mapping(budget, "status", "disruptedPods"):
                continue
            allowed[index] -= 1
            violated |= allowed[index] < 0
        (protected if violated else others).append(pod)
    return protected, others


def _allowed(cluster: Cluster, budget: Mapping[str, Any]) -> int:
    """Return how many pods may go. A budget that is only in manifests has no status yet: then the pods are counted."""
    stated = fields.get(budget, "status", "disruptionsAllowed")
    if isinstance(stated, int):
        return stated
    selector, namespace = fields.get(budget, "spec", "selector"), namespace_of(budget)
    pods = [pod for pod in cluster.pods() if pod.namespace == namespace and selectors.matches(selector, pod.labels)]
    healthy = sum(pod.node is not None and not pod.terminating for pod in pods)
    if (least := fields.get(budget, "spec", "minAvailable")) is not None:
        return max(0, healthy - _count(least, len(pods)))
    return max(0, healthy - (len(pods) - _count(fields.get(budget, "spec", "maxUnavailable"), len(pods))))


def _count(value: Any, of: int) -> int:
    """Return a number of pods, or a percentage of `of` pods rounded up."""
    if isinstance(value, str) and value.endswith("%") and value[:-1].isdigit():
        return math.ceil(int(value[:-1]) * of / 100)
    return value if isinstance(value, int) else 0
