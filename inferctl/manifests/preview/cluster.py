"""Nodes and pods of one cluster, as the scheduler sees them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from inferctl.manifests.kubernetes import fields, selectors
from inferctl.manifests.kubernetes.labels import ZONE
from inferctl.manifests.kubernetes.taints import Taint


@dataclass(frozen=True)
class Node:
    """A node. `allocatable` has CPU in thousandths and other resources in units."""

    name: str
    labels: Mapping[str, str]
    taints: tuple[Taint, ...] = ()
    unschedulable: bool = False
    allocatable: Mapping[str, int] = field(default_factory=dict)

    @property
    def zone(self) -> str:
        """The zone; "" without the label."""
        return self.labels.get(ZONE, "")


@dataclass(frozen=True)
class Term:
    """A required term of affinity or anti-affinity of a pod."""

    key: str
    selector: selectors.Selector
    namespaces: frozenset[str]
    namespace_selector: Mapping[str, Any] | None


@dataclass(frozen=True)
class SpreadConstraint:
    """A topology spread constraint with `DoNotSchedule`."""

    key: str
    max_skew: int
    min_domains: int
    selector: selectors.Selector
    honor_affinity: bool
    honor_taints: bool


@dataclass(eq=False)
class Pod:
    """A pod after admission. Two pods are equal only if they are the same.

    `requests` are what the scheduler counts, `limits` what a quota counts. `started` is in seconds; infinity for a pod
    that has not started. `owner` is the workload of the preview that the pod belongs to.
    """

    namespace: str
    name: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    requests: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    priority: int = 0
    preempts: bool = True
    node: str | None = None
    started: float = math.inf
    terminating: bool = False
    owner: str = ""
    # Whether the simulation has tried to place it.
    tried: bool = False

    @cached_property
    def tolerations(self) -> list[dict[str, Any]]:
        return fields.items(self.spec, "tolerations")

    @cached_property
    def affinity(self) -> list[Term]:
        """The required terms of affinity to other pods."""
        return self._terms("podAffinity")

    @cached_property
    def anti_affinity(self) -> list[Term]:
        """The required terms of anti-affinity to other pods."""
        return self._terms("podAntiAffinity")

    def _terms(self, kind: str) -> list[Term]:
        found = fields.items(self.spec, "affinity", kind, "requiredDuringSchedulingIgnoredDuringExecution")
        return [self._term(each) for each in found]

    def _term(self, term: Mapping[str, Any]) -> Term:
        namespaces = fields.strings(term, "namespaces")
        selector = fields.optional(term, "namespaceSelector")
        if not namespaces and selector is None:
            namespaces = [self.namespace]
        keys, mismatch = fields.strings(term, "matchLabelKeys"), fields.strings(term, "mismatchLabelKeys")
        pods = selectors.with_label_keys(fields.optional(term, "labelSelector"), self.labels, keys, mismatch)
        return Term(fields.text(term, "topologyKey"), selectors.Selector(pods), frozenset(namespaces), selector)

    @cached_property
    def spread(self) -> list[SpreadConstraint]:
        """The topology spread constraints that are filters."""
        return [
            SpreadConstraint(
                fields.text(each, "topologyKey"),
                fields.integer(each, "maxSkew", default=1),
                fields.integer(each, "minDomains", default=1),
                selectors.Selector(
                    selectors.with_label_keys(
                        fields.optional(each, "labelSelector"), self.labels, fields.strings(each, "matchLabelKeys")
                    )
                ),
                fields.text(each, "nodeAffinityPolicy") != "Ignore",
                fields.text(each, "nodeTaintsPolicy") == "Honor",
            )
            for each in fields.items(self.spec, "topologySpreadConstraints")
            if each.get("whenUnsatisfiable", "DoNotSchedule") == "DoNotSchedule"
        ]

    @cached_property
    def claims(self) -> list[str]:
        """The names of the PersistentVolumeClaims that the pod uses."""
        names = (fields.text(each, "persistentVolumeClaim", "claimName") for each in fields.items(self.spec, "volumes"))
        return [name for name in names if name]


@dataclass
class ClusterState:
    """The state of one cluster, which the simulation changes.

    `pods` has pods with and without a node, without those that have finished. `objects` has objects of other kinds by
    kind: priority classes, quotas, budgets, namespaces, claims and volumes. `margins` are by how many pods
    each disruption budget with a status was above its minimum in the files; the simulation changes that.
    """

    name: str
    nodes: dict[str, Node]
    objects: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    margins: dict[tuple[str, str], int] = field(default_factory=dict)
    _on: dict[str, list[Pod]] = field(default_factory=dict)
    _unbound: list[Pod] = field(default_factory=list)
    _used: dict[str, Counter[str]] = field(default_factory=dict)
    # Pods on nodes that keep others away: few, so that the filters need not ask all.
    _repelling: dict[Pod, Node] = field(default_factory=dict)

    def of_kind(self, kind: str) -> Sequence[Mapping[str, Any]]:
        """Return the objects of `kind`."""
        return self.objects.get(kind, ())

    def add(self, pod: Pod) -> None:
        """Add a pod: to its node, or to those that wait."""
        if pod.node is None or pod.node not in self.nodes:
            self._unbound.append(pod)
            return
        self._on.setdefault(pod.node, []).append(pod)
        self._used.setdefault(pod.node, Counter()).update(pod.requests)
        if pod.anti_affinity:
            self._repelling[pod] = self.nodes[pod.node]

    def remove(self, pod: Pod) -> None:
        """Remove a pod."""
        if pod.node is None or pod.node not in self.nodes:
            self._unbound.remove(pod)
            return
        self._on[pod.node].remove(pod)
        self._used[pod.node].subtract(pod.requests)
        self._repelling.pop(pod, None)

    def bind(self, pod: Pod, node: str) -> None:
        """Move a waiting pod to a node."""
        self.remove(pod)
        pod.node = node
        self.add(pod)

    def on(self, node: str) -> Sequence[Pod]:
        """Return the pods of a node."""
        return self._on.get(node, ())

    def used(self, node: str) -> Mapping[str, int]:
        """Return the sum of the requests of the pods of a node."""
        return self._used.get(node, Counter())

    def waiting(self) -> Sequence[Pod]:
        """Return the pods without a node."""
        return self._unbound

    def bound(self) -> Iterator[tuple[Node, Pod]]:
        """Yield each pod that has a node, with the node."""
        for name, pods in self._on.items():
            for pod in pods:
                yield self.nodes[name], pod

    def repelling(self) -> Iterator[tuple[Node, Pod]]:
        """Yield each pod on a node that has required anti-affinity, with the node."""
        for pod, node in self._repelling.items():
            yield node, pod

    def pods(self) -> Iterator[Pod]:
        """Yield all pods."""
        yield from self._unbound
        for pods in self._on.values():
            yield from pods
