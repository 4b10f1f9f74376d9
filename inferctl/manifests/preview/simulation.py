"""Places the pods of Deployments on the nodes of a cluster: at rest, then at the peak.

The scheduler's scores decide among feasible nodes, and they are not imitated. To go on, the simulation takes the
feasible node in the zone and then on the node with the fewest pods of the same Deployment, then with the fewest pods:
an even spread, as the scheduler's default constraints prefer it.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from inferctl.manifests.kubernetes import selectors
from inferctl.manifests.kubernetes.labels import POD_TEMPLATE_HASH
from inferctl.manifests.preview import admission, filters, preemption
from inferctl.manifests.preview.cluster import ClusterState, Pod
from inferctl.manifests.preview.filters import Reason
from inferctl.manifests.preview.preemption import Candidate
from inferctl.manifests.preview.workloads import SimulatedDeployment, serving

# More pods than the largest cluster that Kubernetes supports has nodes and pods for.
MAX_REPLICAS = 150_000


@dataclass
class Attempt:
    """What happened to one new pod.

    `reasons` has every node, with no reasons for a feasible one. `candidates` are the best nodes for preemption, `node`
    is where the simulation put the pod, None if it waits or is `refused`.
    """

    workload: SimulatedDeployment
    pod: Pod
    refused: str | None = None
    reasons: Mapping[str, Sequence[Reason]] = field(default_factory=dict)
    candidates: Sequence[Candidate] = ()
    not_preempting: str | None = None
    node: str | None = None
    evicted: Sequence[Pod] = ()

    @property
    def feasible(self) -> list[str]:
        """The nodes that pass all filters."""
        return [name for name, why in self.reasons.items() if not why]


@dataclass
class ClusterAtPeak:
    """A cluster at the peak. `rest` and `spike` are the new pods up to the least replicas, and then up to the peak.

    `again` are the pods that were evicted and could be placed elsewhere, `waiting` those that could not.
    """

    cluster: ClusterState
    workloads: Sequence[SimulatedDeployment]
    existing: Mapping[str, int]
    rest: list[Attempt]
    spike: list[Attempt]
    again: list[Pod]
    waiting: list[Pod]


def run(cluster: ClusterState, workloads: Sequence[SimulatedDeployment]) -> ClusterAtPeak:
    """Place the pods of `workloads` at rest and at the peak. Changes `cluster`. Raises `ValueError` for a bad quantity.

    Pods of these Deployments that already run in the cluster stay, and count as replicas.
    """
    existing = {each.key: adopt(cluster, each) for each in workloads}
    workloads = [_like_running(cluster, each) for each in workloads]
    # The queue of the scheduler: higher priority first.
    ordered = sorted(workloads, key=lambda each: (-new_pod(cluster, each, 0).priority, each.preference))
    rest = [attempt for each in ordered for attempt in scale(cluster, each, each.least)]
    spike = fill(cluster, ordered)
    evicted = [pod for attempt in (*rest, *spike) for pod in attempt.evicted]
    again = settle(cluster, evicted)
    waiting = [pod for pod in cluster.waiting() if pod in evicted]
    return ClusterAtPeak(cluster, workloads, existing, rest, spike, again, waiting)


def fill(cluster: ClusterState, workloads: Sequence[SimulatedDeployment]) -> list[Attempt]:
    """Scale `workloads`, in this order, to what the peak needs, else to their most, and place the new pods.

    The first Deployment of a model takes what it can. What its pods with a node do not serve is left to the next one,
    so pods that wait for hardware are made up for by other hardware.
    """
    left = {
        model: max((each.peak or 0.0 for each in flavors), default=0.0) or None
        for model, flavors in serving(workloads).items()
    }
    flavors = {each.key for each in workloads if each.rate is not None}
    attempts: list[Attempt] = []
    for each in workloads:
        need = left.get(each.model) if each.key in flavors else None
        if need is None or each.rate is None:
            attempts += scale(cluster, each, each.most)
            continue
        planned = each.rate * each.utilization
        # The tolerance keeps an exact multiple from needing one more.
        wanted = math.ceil(max(0.0, need) / planned - 1e-9) if planned else each.most
        attempts += scale(cluster, each, min(each.most, max(each.least, wanted)))
        bound = sum(pod.owner == each.key and not pod.terminating for _, pod in cluster.bound())
        left[each.model] = need - bound * planned
    return attempts


def adopt(cluster: ClusterState, workload: SimulatedDeployment) -> int:
    """Mark the pods of `workload` that are in the cluster, and return their number."""
    count = 0
    for pod in cluster.pods():
        if pod.namespace == workload.namespace and selectors.matches(workload.selector or None, pod.labels):
            pod.owner = workload.key
            count += not pod.terminating
    return count


def _like_running(cluster: ClusterState, workload: SimulatedDeployment) -> SimulatedDeployment:
    """Return `workload` with the template hash of its newest pods: they stay, and its new pods are like them.

    Without running pods, all new ones have the same value.
    """
    own = (pod for pod in cluster.pods() if pod.owner == workload.key and POD_TEMPLATE_HASH in pod.labels)
    hashes = [(pod.started, pod.labels[POD_TEMPLATE_HASH]) for pod in own]
    return replace(workload, labels={**workload.labels, POD_TEMPLATE_HASH: max(hashes)[1] if hashes else "preview"})


def new_pod(cluster: ClusterState, workload: SimulatedDeployment, index: int) -> Pod:
    """Return pod number `index` of `workload`. Raises `ValueError` for an invalid quantity."""
    name = f"{workload.name}-{index + 1}"
    pod = admission.admitted(cluster.objects, workload.namespace, name, workload.labels, workload.spec)
    pod.owner = workload.key
    return pod


def scale(cluster: ClusterState, workload: SimulatedDeployment, replicas: int) -> list[Attempt]:
    """Add pods of `workload` until it has `replicas`, and place them; also pods of it that wait in the given state.

    After a pod that is refused or waits, the next new ones have the same result. Raises `ValueError` for a number of
    replicas that no cluster can have.
    """
    if replicas > MAX_REPLICAS:
        raise ValueError(f"{workload.name} may have {replicas:,} replicas, and the most is {MAX_REPLICAS:,}")
    attempts: list[Attempt] = []
    failed: Attempt | None = None
    present = [pod for pod in cluster.pods() if pod.owner == workload.key and not pod.terminating]
    # Its pods that wait: placed here, unless an earlier step of the simulation has tried.
    pending = [pod for pod in present if pod.node is None and not pod.tried]
    for index in range(len(present) - len(pending), replicas):
        known = pending.pop(0) if pending else None
        if known:
            cluster.remove(known)
        pod = known or new_pod(cluster, workload, index)
        attempts.append(_repeat(cluster, pod, failed) if failed and not known else place(cluster, pod, workload))
        failed = attempts[-1] if attempts[-1].node is None and not known else None
    return attempts


def _repeat(cluster: ClusterState, pod: Pod, last: Attempt) -> Attempt:
    """Return the result of a pod like that of `last`, which found no place: a quota may refuse it, nothing is freed."""
    pod.tried = True
    refused = last.refused or admission.refusal(cluster, pod)
    if refused:
        return Attempt(last.workload, pod, refused=refused)
    cluster.add(pod)
    return replace(last, pod=pod)


def place(cluster: ClusterState, pod: Pod, workload: SimulatedDeployment) -> Attempt:
    """Admit and place a new pod: on a feasible node, else by preemption, else it waits."""
    pod.tried = True
    if refused := admission.refusal(cluster, pod):
        return Attempt(workload, pod, refused=refused)
    cluster.add(pod)
    reasons = filters.feasible(cluster, pod)
    attempt = Attempt(workload, pod, reasons=reasons)
    if attempt.feasible:
        attempt.node = _choose(cluster, pod, attempt.feasible)
        cluster.bind(pod, attempt.node)
        return attempt
    attempt.not_preempting = None if pod.preempts else "preemptionPolicy is Never"
    attempt.candidates = preemption.best(cluster, pod, reasons)
    if attempt.candidates:
        chosen = min(attempt.candidates, key=lambda each: natural(each.node))
        attempt.evicted = [_evict(cluster, victim) for victim in chosen.victims]
        attempt.node = chosen.node
        cluster.bind(pod, chosen.node)
    return attempt


def _evict(cluster: ClusterState, victim: Pod) -> Pod:
    """Remove a pod from its node and return the one that its owner creates instead, which waits."""
    cluster.remove(victim)
    again = copy.copy(victim)
    again.node, again.started, again.terminating = None, math.inf, False
    cluster.add(again)
    return again


def settle(cluster: ClusterState, pods: Iterable[Pod]) -> list[Pod]:
    """Place those of `pods` that wait, higher priority first, without preemption; return those that found a node."""
    placed = []
    for pod in sorted(pods, key=lambda each: -each.priority):
        if pod not in cluster.waiting():
            continue
        found = [name for name, why in filters.feasible(cluster, pod).items() if not why]
        if found:
            cluster.bind(pod, _choose(cluster, pod, found))
            placed.append(pod)
    return placed


def _choose(cluster: ClusterState, pod: Pod, names: Sequence[str]) -> str:
    own = {
        name: sum(other.owner == pod.owner and not other.terminating for other in cluster.on(name))
        for name in cluster.nodes
    }
    zones: dict[str, int] = {}
    for name, node in cluster.nodes.items():
        zones[node.zone] = zones.get(node.zone, 0) + own[name]
    return min(
        names,
        key=lambda name: (zones[cluster.nodes[name].zone], own[name], len(cluster.on(name)), natural(name)),
    )


def natural(name: str) -> tuple[str | int, ...]:
    """Return a key that sorts `gpu-2` before `gpu-10`."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name))
