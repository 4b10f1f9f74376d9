"""What the loss of a node, a zone, a region or a cluster costs at the peak, and when it is made good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from inferctl.manifests.kubernetes import fields
from inferctl.manifests.kubernetes.labels import REGION, ZONE
from inferctl.manifests.preview import admission, simulation
from inferctl.manifests.preview.cluster import ClusterState, Pod
from inferctl.manifests.preview.simulation import Attempt, ClusterAtPeak
from inferctl.manifests.preview.workloads import SimulatedDeployment, serving

# Until the controller manager marks a silent node as lost: --node-monitor-grace-period, 50 s from 1.32.
DETECTION_S = 50
# KEDA polls every 15 s in the manifests of `inferctl deploy`, and the autoscaler of pods looks every 15 s.
AUTOSCALER_S = 30
# At most so many kinds of nodes are lost one by one.
MAX_NODES = 300


@dataclass
class Loss:
    """The loss of one place for one model. `alike`: how many nodes are equal to this one.

    `before`, `at_once` and `later` are what serves before, right after, and once the `moved` of the `lost` pods are
    ready on other nodes, after `later_s`; in `unit`: tokens/s, or replicas if a rate is not stated. `preempting` of the
    moved pods evict `evicted` others. `waiting` pods need new nodes until `recovered_s`. The autoscaler adds `added`
    pods of the next hardware, or in the clusters that are left, so that `covered` serves from `covered_s` on.
    The seconds are None if there is no such time, or a Deployment does not state its load time or cold start. `full` is
    the capacity of all replicas, `demand` the peak in tokens/s, if stated.
    """

    scope: str
    place: str
    cluster: str
    model: str
    unit: str
    full: float
    demand: float | None
    before: float
    at_once: float
    later: float
    lost: int
    alike: int = 1
    moved: int = 0
    preempting: int = 0
    evicted: int = 0
    waiting: int = 0
    added: int = 0
    covered: float = 0.0
    covered_s: float | None = None
    why: Mapping[str, int] = field(default_factory=dict)
    later_s: float | None = None
    recovered_s: float | None = None

    def share(self, amount: float) -> float:
        """Return `amount` as a share of the peak, else of the capacity of all replicas; at most 1."""
        whole = self.demand or self.full
        return min(1.0, amount / whole) if whole else 1.0


@dataclass(frozen=True)
class Rates:
    """The capacity of a replica by cluster and workload, in `unit`, for one model in all clusters.

    `full` is the capacity of all replicas, `demand` the peak in tokens/s, if stated.
    """

    model: str
    unit: str
    values: Mapping[tuple[str, str], float]
    full: float
    demand: float | None

    def of(self, cluster: str, pods: Sequence[Pod]) -> float:
        """Return what `pods` serve; pods of others serve nothing of this model."""
        return sum(self.values.get((cluster, pod.owner), 0.0) for pod in pods)

    def owns(self, cluster: str, pod: Pod) -> bool:
        return (cluster, pod.owner) in self.values


def rates(outcomes: Sequence[ClusterAtPeak]) -> list[Rates]:
    """Return the rates of each model."""
    models: dict[str, list[tuple[str, SimulatedDeployment]]] = {}
    for outcome in outcomes:
        for model, workloads in serving(outcome.workloads).items():
            models.setdefault(model, []).extend((outcome.cluster.name, each) for each in workloads)
    found = []
    for model, pairs in models.items():
        known = all(each.rate is not None for _, each in pairs)
        values = {(cluster, each.key): (each.rate or 0.0) if known else 1.0 for cluster, each in pairs}
        full = sum(values[cluster, each.key] * each.most for cluster, each in pairs)
        peaks: dict[str, float] = {}
        for cluster, each in pairs:
            peaks[cluster] = max(peaks.get(cluster, 0.0), each.peak or 0.0)
        demand = sum(peaks.values()) if known else 0.0
        found.append(Rates(model, "tokens/s" if known else "replicas", values, full, demand or None))
    return found


def run(outcomes: Sequence[ClusterAtPeak]) -> list[Loss]:
    """Return the losses of each node, zone, region and cluster in which pods of models run.

    A lost node or zone concerns its cluster: its capacity is compared with the cluster's part of the peak, since
    traffic does not move to other clusters by itself. A lost cluster or region is compared with the whole peak.
    """
    losses: list[Loss] = []
    for outcome in outcomes:
        models = rates([outcome])
        for names in _alike(outcome.cluster):
            found = _lose_nodes(outcome, models, "node", names[0], names[:1])
            losses += [replace(each, alike=len(names)) for each in found]
        for zone, names in _zones(outcome.cluster).items():
            losses += _lose_nodes(outcome, models, "zone", zone, names)
    if len(outcomes) > 1:
        models = rates(outcomes)
        for outcome in outcomes:
            losses += _lose_clusters([outcome], outcomes, models, "cluster", outcome.cluster.name)
        for region, inside in sorted(_regions(outcomes).items()):
            if len(inside) > 1:
                losses += _lose_clusters(inside, outcomes, models, "region", region)
    return losses


def _alike(cluster: ClusterState) -> list[list[str]]:
    """Return the nodes with pods of the preview, in groups that differ only by name: the loss of each is the same."""
    groups: dict[object, list[str]] = {}
    keys = _asked(cluster)
    for name, node in cluster.nodes.items():
        pods = cluster.on(name)
        if any(pod.owner for pod in pods):
            labels = tuple(sorted((key, value) for key, value in node.labels.items() if key in keys and value != name))
            held = tuple(sorted((pod.owner, pod.priority, sorted(pod.labels.items())) for pod in pods))
            kind = (labels, node.taints, node.unschedulable, tuple(sorted(node.allocatable.items())), repr(held))
            groups.setdefault(kind, []).append(name)
    return list(groups.values())[:MAX_NODES]


def _asked(cluster: ClusterState) -> set[str]:
    """Return the labels of nodes that a pod or a volume asks for. Others, such as serial numbers, change nothing."""
    keys = {ZONE, REGION}
    for pod in cluster.pods():
        required = ("affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
        keys |= fields.mapping(pod.spec, "nodeSelector").keys()
        keys |= _in_terms(fields.mapping(pod.spec, *required))
        keys |= {term.key for term in (*pod.affinity, *pod.anti_affinity)}
        keys |= {constraint.key for constraint in pod.spread}
    for volume in cluster.of_kind("PersistentVolume"):
        keys |= _in_terms(fields.mapping(volume, "spec", "nodeAffinity", "required"))
    for storage_class in cluster.of_kind("StorageClass"):
        for term in fields.items(storage_class, "allowedTopologies"):
            keys |= {fields.text(each, "key") for each in fields.items(term, "matchLabelExpressions")}
    return keys


def _in_terms(selector: Mapping[str, object]) -> set[str]:
    terms = fields.items(selector, "nodeSelectorTerms")
    return {fields.text(each, "key") for term in terms for each in fields.items(term, "matchExpressions")}


def _zones(cluster: ClusterState) -> dict[str, list[str]]:
    zones: dict[str, list[str]] = {}
    for name, node in cluster.nodes.items():
        if node.zone:
            zones.setdefault(node.zone, []).append(name)
    return dict(sorted(zones.items()))


def _regions(outcomes: Sequence[ClusterAtPeak]) -> dict[str, list[ClusterAtPeak]]:
    found: dict[str, list[ClusterAtPeak]] = {}
    for outcome in outcomes:
        for name in {node.labels.get(REGION, "") for node in outcome.cluster.nodes.values()} - {""}:
            found.setdefault(name, []).append(outcome)
    return found


def _lose_nodes(
    outcome: ClusterAtPeak, models: Sequence[Rates], scope: str, place: str, names: Sequence[str]
) -> list[Loss]:
    cluster = outcome.cluster.copy()
    name = cluster.name
    lost = cluster.lose(names)
    attempts = _replace(cluster, outcome.workloads, lost)
    evicted = [pod for attempt in attempts for pod in attempt.evicted]
    # Pods that others evicted, and that found no other node, serve no more.
    ended = [pod for pod in evicted if pod.node is None]
    fallback = simulation.fill(cluster, outcome.queue)
    losses = []
    for model in models:
        gone = [pod for pod in lost if model.owns(name, pod)]
        if not gone:
            continue
        before = _serving([outcome], model)
        mine = [each for each in attempts if model.owns(name, each.pod)]
        moved, waiting = [each for each in mine if each.node], [each for each in mine if not each.node]
        added = [each for each in fallback if model.owns(name, each.pod) and each.node]
        at_once = before - model.of(name, gone)
        later = at_once + model.of(name, [each.pod for each in moved]) - model.of(name, ended)
        loss = Loss(
            scope, place, name, model.model, model.unit, model.full, model.demand, before, at_once, later, len(gone)
        )
        loss.moved, loss.waiting, loss.added = len(moved), len(waiting), len(added)
        loss.preempting = sum(bool(each.evicted) for each in moved)
        loss.evicted = sum(len(each.evicted) for each in moved)
        loss.why = Counter(each.refused or summary(each) for each in waiting)
        loss.later_s = _ready_s([(each.pod, each.workload.load_s) for each in moved])
        cold_s = _ready_s([(each.pod, each.workload.cold_start_s) for each in waiting])
        loss.recovered_s = cold_s if waiting else loss.later_s
        loss.covered = later + model.of(name, [each.pod for each in added])
        loss.covered_s = _covered_s(waiting, added)
        if loss.covered_s is not None and moved:
            # What serves then includes the pods that moved.
            loss.covered_s = None if loss.later_s is None else max(loss.covered_s, loss.later_s)
        losses.append(loss)
    return losses


def _covered_s(waiting: Sequence[Attempt], added: Sequence[Attempt]) -> float | None:
    """Return when the pods of the next hardware are ready, which the autoscaler adds for those that wait.

    It counts a Deployment as out of hardware once pods have been missing for its cold start, and then looks twice.
    """
    if not added:
        return None
    missing = [each.workload.cold_start_s for each in waiting]
    loads = [each.workload.load_s for each in added]
    known = [each for each in (*missing, *loads) if each is not None]
    if len(known) < len(missing) + len(loads):
        return None
    return DETECTION_S + max(known[: len(missing)], default=0.0) + AUTOSCALER_S + max(known[len(missing) :])


def _lose_clusters(
    lost: Sequence[ClusterAtPeak],
    outcomes: Sequence[ClusterAtPeak],
    models: Sequence[Rates],
    scope: str,
    place: str,
) -> list[Loss]:
    """Return the losses of whole clusters. Their traffic goes to the other ones, which add pods for it."""
    rest = [each for each in outcomes if each not in lost]
    more = {model.model: _factor(model.model, rest, outcomes) for model in models}
    extra = [(each.cluster.name, attempt) for each in rest for attempt in _grow(each, more)]
    losses = []
    for model in models:
        before = _serving(outcomes, model)
        left = before - _serving(lost, model)
        gone = sum(len(_pods(each, model)) for each in lost)
        if not gone:
            continue
        names = ", ".join(each.cluster.name for each in lost)
        loss = Loss(
            scope, place, names, model.model, model.unit, model.full, model.demand, before, left, left, lost=gone
        )
        mine = [(cluster, each) for cluster, each in extra if model.owns(cluster, each.pod)]
        added = [(cluster, each) for cluster, each in mine if each.node]
        waiting = [each for _, each in mine if not each.node]
        loss.added, loss.waiting = len(added), len(waiting)
        loss.covered = left + sum(model.of(cluster, [each.pod]) for cluster, each in added)
        loss.covered_s = _started_s([each.workload.load_s for _, each in added])
        loss.why = Counter(each.refused or summary(each) for each in waiting)
        loss.recovered_s = _started_s([each.workload.cold_start_s for each in waiting])
        losses.append(loss)
    return losses


def _factor(model: str, rest: Sequence[ClusterAtPeak], outcomes: Sequence[ClusterAtPeak]) -> float:
    """Return by how much the peak of a model grows in the clusters that are left."""
    before, after = _demand(model, outcomes), _demand(model, rest)
    return before / after if after else 1.0


def _demand(model: str, outcomes: Sequence[ClusterAtPeak]) -> float:
    return sum(each.demand or 0.0 for each in rates(outcomes) if each.model == model)


def _grow(outcome: ClusterAtPeak, more: Mapping[str, float]) -> list[Attempt]:
    """Return the new pods of a cluster if the peaks of its models grow by the factors `more`."""
    queue = [replace(each, peak=each.peak * more.get(each.model, 1.0)) if each.peak else each for each in outcome.queue]
    return simulation.fill(outcome.cluster.copy(), queue)


def _started_s(starts: Sequence[float | None]) -> float | None:
    """Return when pods are ready that the autoscaler adds at once; None without pods, or if a time is not known."""
    known = [each for each in starts if each is not None]
    return AUTOSCALER_S + max(known) if known and len(known) == len(starts) else None


def _pods(outcome: ClusterAtPeak, model: Rates) -> list[Pod]:
    return [pod for _, pod in outcome.cluster.bound() if model.owns(outcome.cluster.name, pod)]


def _serving(outcomes: Sequence[ClusterAtPeak], model: Rates) -> float:
    return sum(model.of(each.cluster.name, _pods(each, model)) for each in outcomes)


def _replace(cluster: ClusterState, workloads: Sequence[SimulatedDeployment], lost: Sequence[Pod]) -> list[Attempt]:
    """Place a new pod for each lost one, higher priority first, and the pods that these evict."""
    found = {each.key: each for each in workloads}
    owned = sorted((pod for pod in lost if pod.owner in found), key=lambda pod: -pod.priority)
    attempts = []
    for index, pod in enumerate(owned):
        fresh = simulation.new_pod(cluster, found[pod.owner], index)
        fresh.name = f"{pod.name}-again"
        attempts.append(simulation.place(cluster, fresh, found[pod.owner]))
    simulation.settle(cluster, [pod for attempt in attempts for pod in attempt.evicted])
    return attempts


def summary(attempt: Attempt) -> str:
    """Return why a pod waits: the first filter that fails, with the number of nodes.

    Nodes that could be right, if pods were evicted there, hide those that never can, such as other hardware.
    """
    first = [why[0] for why in attempt.reasons.values() if why]
    possible = [reason for reason in first if reason.resolvable] or first
    counts = Counter(reason.plugin for reason in possible)
    return ", ".join(f"{plugin} on {count} {'node' if count == 1 else 'nodes'}" for plugin, count in counts.items())


def _ready_s(pods: Sequence[tuple[Pod, float | None]]) -> float | None:
    """Return when the slowest pod is ready: its node counts as lost, it is evicted from there, and starts elsewhere.

    `pods`: each with the seconds of its start. None without pods, or if a time is not known.
    """
    found = []
    for pod, start_s in pods:
        away = eviction_s(pod)
        if start_s is None or away is None:
            return None
        found.append(DETECTION_S + away + start_s)
    return max(found, default=None)


def eviction_s(pod: Pod) -> float | None:
    """Return how long a pod stays on a node that is marked as lost: the tolerationSeconds; None forever."""
    seconds = []
    for toleration in pod.tolerations:
        key, effect = fields.text(toleration, "key"), fields.text(toleration, "effect")
        if key in ("", "node.kubernetes.io/unreachable") and effect in ("", "NoExecute"):
            given = toleration.get("tolerationSeconds")
            if not isinstance(given, int):
                return None
            seconds.append(max(0, given))
    return float(min(seconds, default=admission.EVICTION_S))
