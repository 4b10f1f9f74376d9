"""Filters that look at other pods: topology spread and affinity between pods.

`View` counts once for a pod what the filters ask of each node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from inferctl.manifests.kubernetes import fields, selectors
from inferctl.manifests.kubernetes.taints import untolerated
from inferctl.manifests.preview.cluster import ClusterState, Node, Pod, SpreadConstraint, Term

Domain = tuple[str, str]


@dataclass
class View:
    """Counts of other pods by topology domain (key, value), for one pod to schedule.

    `spread` has the pods per domain value of each constraint. `wanted` counts pods that match all terms of affinity,
    `unwanted` those that match a term of anti-affinity, and `repelled` the pods whose own anti-affinity matches this
    pod.
    """

    pod: Pod
    spread: list[dict[str, int]] = field(default_factory=list)
    wanted: Counter[Domain] = field(default_factory=Counter)
    unwanted: Counter[Domain] = field(default_factory=Counter)
    repelled: Counter[Domain] = field(default_factory=Counter)
    namespaces: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def view(pod: Pod, cluster: ClusterState) -> View:
    """Return the counts for `pod` in the present state of `cluster`."""
    namespaces = {
        fields.text(each, "metadata", "name"): fields.text_map(fields.mapping(each, "metadata", "labels"))
        for each in cluster.of_kind("Namespace")
    }
    found = View(pod, namespaces=namespaces)
    _count_spread(found, cluster)
    for node, other in cluster.repelling():
        hit = [term for term in other.anti_affinity if matches(term, pod, namespaces)]
        found.repelled.update(_domains(hit, node))
    for node, other in cluster.bound() if pod.affinity or pod.anti_affinity else ():
        if pod.affinity and all(matches(term, other, namespaces) for term in pod.affinity):
            found.wanted.update(_domains(pod.affinity, node))
        hit = [term for term in pod.anti_affinity if matches(term, other, namespaces)]
        found.unwanted.update(_domains(hit, node))
    return found


def is_counted(seen: View, other: Pod) -> bool:
    """Return whether `other`, if it has a node, is one of the pods that `seen` may count."""
    pod = seen.pod
    spread = other.namespace == pod.namespace and any(
        constraint.selector.matches(other.labels) for constraint in pod.spread
    )
    return (
        spread
        or any(matches(term, other, seen.namespaces) for term in (*pod.affinity, *pod.anti_affinity))
        or any(matches(term, pod, seen.namespaces) for term in other.anti_affinity)
    )


def matches(term: Term, pod: Pod, namespaces: Mapping[str, Mapping[str, str]]) -> bool:
    """Return whether `pod` is in a namespace of `term` and its labels match."""
    in_namespace = pod.namespace in term.namespaces or (
        term.namespace_selector is not None
        and selectors.matches(term.namespace_selector, namespace_labels(pod.namespace, namespaces))
    )
    return in_namespace and term.selector.matches(pod.labels)


def namespace_labels(name: str, namespaces: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    """Return the labels of a namespace. Kubernetes gives each one its name as a label."""
    return {"kubernetes.io/metadata.name": name, **namespaces.get(name, {})}


def _domains(terms: list[Term], node: Node) -> list[Domain]:
    return [(term.key, node.labels[term.key]) for term in terms if term.key in node.labels]


def _count_spread(found: View, cluster: ClusterState) -> None:
    pod = found.pod
    found.spread = [{} for _ in pod.spread]
    if not pod.spread:
        return
    keys = [constraint.key for constraint in pod.spread]
    for node in cluster.nodes.values():
        # A node counts only if it has the keys of all constraints.
        if any(key not in node.labels for key in keys):
            continue
        for constraint, counts in zip(pod.spread, found.spread, strict=True):
            if not _included(constraint, pod, node):
                continue
            value = node.labels[constraint.key]
            # A terminating pod does not count, and for an empty selector none does.
            others = () if constraint.selector.empty else cluster.on(node.name)
            hits = sum(
                not other.terminating and other.namespace == pod.namespace and constraint.selector.matches(other.labels)
                for other in others
            )
            counts[value] = counts.get(value, 0) + hits


def _included(constraint: SpreadConstraint, pod: Pod, node: Node) -> bool:
    """Return whether the pods of a node count, by nodeAffinityPolicy and nodeTaintsPolicy."""
    if constraint.honor_affinity and not selectors.node_matches(pod.spec, node.name, node.labels):
        return False
    return not (constraint.honor_taints and untolerated(pod.tolerations, node.taints))


def spread_violation(counted: View, node: Node) -> tuple[str, bool] | None:
    """Return why `node` violates a topology spread constraint, and whether an eviction may help; None if it fits."""
    pod = counted.pod
    for constraint, counts in zip(pod.spread, counted.spread, strict=True):
        value = node.labels.get(constraint.key)
        if value is None:
            return f"has no label {constraint.key}, over which the pods spread", False
        least = min(counts.values(), default=0) if len(counts) >= constraint.min_domains else 0
        if not counts:
            continue
        own = int(constraint.selector.matches(pod.labels))
        here = counts.get(value, 0)
        if here + own - least > constraint.max_skew:
            few = (
                f" ({len(counts)} of {constraint.min_domains} domains)" if len(counts) < constraint.min_domains else ""
            )
            return (
                f"{constraint.key} {value} would have {here + own} pods, the least is {least}{few}: "
                f"more than maxSkew {constraint.max_skew} apart",
                True,
            )
    return None


def affinity_violation(counted: View, node: Node) -> tuple[str, bool] | None:
    """Return why `node` violates affinity between pods, and whether an eviction may help; None if it fits."""
    pod = counted.pod
    for term in pod.affinity:
        if term.key not in node.labels:
            return f"has no label {term.key}, on which affinity to pods depends", False
    absent = [term for term in pod.affinity if not counted.wanted[term.key, node.labels[term.key]]]
    if absent:
        # The first of pods with affinity to each other may go anywhere.
        itself = all(matches(term, pod, counted.namespaces) for term in pod.affinity)
        if counted.wanted or not itself:
            key = absent[0].key
            return f"no pod that the affinity wants is in {key} {node.labels[key]}", False
    for term in pod.anti_affinity:
        value = node.labels.get(term.key)
        if value is not None and counted.unwanted[term.key, value]:
            return f"a pod that the anti-affinity excludes is in {term.key} {value}", True
    for key, value in counted.repelled:
        if node.labels.get(key) == value:
            return f"a pod in {key} {value} has anti-affinity to this pod", True
    return None
