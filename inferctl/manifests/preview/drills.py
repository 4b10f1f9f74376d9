"""What share of the peak is still served right after the loss of a node, a zone, a region or a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from inferctl.manifests.kubernetes.labels import REGION
from inferctl.manifests.preview.cluster import Node
from inferctl.manifests.preview.simulation import ClusterAtPeak
from inferctl.manifests.preview.workloads import SimulatedDeployment, serving

# Cluster and workload.
Key = tuple[str, str]


@dataclass(frozen=True)
class Loss:
    """The loss of one place for one model. `alike`: how many nodes with pods of the same Deployments there are.

    `before` and `at_once` are what serves before and right after, `full` the capacity of all replicas, in `unit`:
    tokens/s, or replicas if a rate is not stated. `demand` is the peak in tokens/s, if stated. `lost`: number of pods.
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
    lost: int
    alike: int = 1

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
    values: Mapping[Key, float]
    full: float
    demand: float | None


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
    """Return the losses of each node, zone, cluster and region in which pods of models run.

    A lost node or zone concerns its cluster: its capacity is compared with the cluster's part of the peak, since
    traffic does not move to other clusters by itself. A lost cluster or region is compared with the whole peak.
    """
    losses: list[Loss] = []
    for outcome in outcomes:
        losses += _losses([outcome], "node", lambda _, node: node.name)
        losses += _losses([outcome], "zone", lambda _, node: node.zone)
    if len(outcomes) > 1:
        losses += _losses(outcomes, "cluster", lambda cluster, _: cluster)
        # The loss of a region with one cluster is that of the cluster.
        losses += _losses(outcomes, "region", lambda _, node: node.labels.get(REGION, ""), least_clusters=2)
    return losses


def _losses(
    outcomes: Sequence[ClusterAtPeak], scope: str, place_of: Callable[[str, Node], str], least_clusters: int = 1
) -> list[Loss]:
    """Return the losses by place. `place_of`: of a cluster and a node; "" if it has no name."""
    pods = [
        (place_of(outcome.cluster.name, node), (outcome.cluster.name, pod.owner))
        for outcome in outcomes
        for node, pod in outcome.cluster.bound()
    ]
    losses = []
    for model in rates(outcomes):
        before = sum(model.values.get(key, 0.0) for _, key in pods)
        gone: dict[str, list[Key]] = {}
        for place, key in pods:
            if place and key in model.values:
                gone.setdefault(place, []).append(key)
        # The loss of each node with the same pods is the same.
        groups = Counter(tuple(sorted(keys)) for keys in gone.values()) if scope == "node" else None
        for place, keys in sorted(gone.items()):
            kind = tuple(sorted(keys))
            alike = groups.pop(kind, 0) if groups is not None else 1
            names = dict.fromkeys(cluster for cluster, _ in keys)
            if alike and len(names) >= least_clusters:
                left = before - sum(model.values[key] for key in keys)
                whole = (model.unit, model.full, model.demand, before)
                losses.append(Loss(scope, place, ", ".join(names), model.model, *whole, left, len(keys), alike))
    return losses
