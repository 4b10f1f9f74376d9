"""The result of a preview as plain data: for `--json`, and for the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inferctl.manifests.kubernetes import fields
from inferctl.manifests.preview import volumes
from inferctl.manifests.preview.drills import Loss
from inferctl.manifests.preview.preemption import Candidate
from inferctl.manifests.preview.simulation import Attempt, ClusterAtPeak
from inferctl.manifests.preview.workloads import SimulatedDeployment

_NOT_PLACED = ("StatefulSet", "DaemonSet", "ReplicaSet", "CronJob", "LeaderWorkerSet")
# From so many nodes on, the scheduler looks at a part of the candidates for preemption only.
_ALL_CANDIDATES = 100


def document(outcomes: Sequence[ClusterAtPeak], losses: Sequence[Loss]) -> dict[str, Any]:
    """Return the whole result."""
    return {
        "fits_at_rest": all(_fits(attempt) for outcome in outcomes for attempt in outcome.rest),
        "fits_at_peak": all(_fits(attempt) for outcome in outcomes for attempt in outcome.spike),
        "clusters": [_cluster(outcome) for outcome in outcomes],
        "drills": [_loss(loss) for loss in losses],
    }


def _fits(attempt: Attempt) -> bool:
    """Return whether the pod has a node. A placeholder may wait: it then makes an autoscaler add one."""
    return attempt.node is not None or attempt.workload.placeholder


def _cluster(outcome: ClusterAtPeak) -> dict[str, Any]:
    return {
        "name": outcome.cluster.name,
        "nodes": len(outcome.cluster.nodes),
        "deployments": [_workload(outcome, each) for each in outcome.workloads],
        "evicted": _evicted(outcome),
        "notes": list(_notes(outcome)),
    }


def _workload(outcome: ClusterAtPeak, workload: SimulatedDeployment) -> dict[str, Any]:
    rest = [each for each in outcome.rest if each.workload is workload]
    spike = [each for each in outcome.spike if each.workload is workload]
    bound = [pod for _, pod in outcome.cluster.bound() if pod.owner == workload.key]
    requests = next((each.pod.requests for each in [*rest, *spike]), {})
    return {
        "name": workload.name,
        "namespace": workload.namespace,
        "model": workload.model,
        "placeholder": workload.placeholder,
        "min_replicas": workload.least,
        "max_replicas": workload.most,
        "scaled_by": workload.scaled_by or None,
        "running": outcome.existing[workload.key],
        "at_peak": len(bound),
        "tokens_per_second": workload.rate,
        "priority": next((each.pod.priority for each in [*rest, *spike]), None),
        "requests": {name: fields.show(name, amount) for name, amount in requests.items()},
        "pods": [*_groups(rest, "rest"), *_groups(spike, "spike")],
    }


def _groups(attempts: Sequence[Attempt], phase: str) -> list[dict[str, Any]]:
    """Return the results of the pods. Consecutive pods with the same result share one entry."""
    found: list[dict[str, Any]] = []
    last: object = None
    for attempt in attempts:
        kind = _kind(attempt)
        if kind != last:
            found.append({"phase": phase, "names": [], **_attempt(attempt)})
            last = kind
        found[-1]["names"].append(attempt.pod.name)
        found[-1]["nodes"] += [attempt.node] if attempt.node else []
        found[-1]["evicted"] += [pod.name for pod in attempt.evicted]
    return found


def _kind(attempt: Attempt) -> object:
    """Return what pods must have in common to be shown as one."""
    first = {name: why[0].plugin for name, why in attempt.reasons.items() if why}
    return attempt.refused, attempt.feasible, first, bool(attempt.evicted)


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "refused": attempt.refused,
        "feasible": attempt.feasible,
        "infeasible": _reasons(attempt),
        "preemption": [_candidate(each) for each in attempt.candidates],
        "no_preemption": attempt.not_preempting,
        "nodes": [],
        "evicted": [],
        "waits": attempt.node is None and not attempt.refused,
    }


def _reasons(attempt: Attempt) -> list[dict[str, Any]]:
    """Return the reasons, each with the nodes that have them. The scheduler reports the first one of a node."""
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, why in attempt.reasons.items():
        if why:
            found.setdefault(tuple((each.plugin, each.text) for each in why), []).append(name)
    return [
        {"nodes": names, "reasons": [{"filter": plugin, "text": text} for plugin, text in why]}
        for why, names in found.items()
    ]


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "node": candidate.node,
        "victims": [pod.name for pod in candidate.victims],
        "priorities": [pod.priority for pod in candidate.victims],
        "violated_budgets": candidate.violations,
    }


def _evicted(outcome: ClusterAtPeak) -> list[dict[str, Any]]:
    """Return what becomes of evicted pods, by workload. The key is empty for pods of others."""
    found: dict[str, dict[str, Any]] = {}
    names = {each.key: each for each in outcome.workloads}
    for pods, what in ((outcome.again, "placed_again"), (outcome.waiting, "waiting")):
        for pod in pods:
            entry = found.setdefault(pod.owner, {"deployment": pod.owner or None, "placed_again": 0, "waiting": 0})
            entry["placeholder"] = pod.owner in names and names[pod.owner].placeholder
            entry[what] += 1
    return list(found.values())


def _notes(outcome: ClusterAtPeak) -> Iterable[str]:
    cluster = outcome.cluster
    pods = [attempt.pod for attempt in (*outcome.rest, *outcome.spike)]
    claims = {name for pod in pods for name in volumes.unknown(cluster, pod)}
    if claims:
        yield f"claims without a volume in the files, so their zone is not checked: {', '.join(sorted(claims))}"
    if any(pod.spec.get("resourceClaims") for pod in pods):
        yield "devices that pods claim with DRA (resourceClaims) are not checked"
    schedulers = {fields.text(pod.spec, "schedulerName") for pod in pods} - {"", "default-scheduler"}
    if schedulers:
        yield f"pods of the scheduler {', '.join(sorted(schedulers))} are placed by the rules of the default one"
    for kind in _NOT_PLACED:
        if count := len(cluster.of_kind(kind)):
            yield f"{count} {kind} in the manifests: only Deployments and Jobs are placed"
    for each in cluster.of_kind("CapacityBuffer"):
        name = fields.text(each, "metadata", "name")
        yield f"CapacityBuffer {name}: its nodes count only if the nodes file lists them"
    elsewhere = sum(pod.node is not None for pod in cluster.waiting())
    if elsewhere:
        yield f"{elsewhere} pods are on nodes that the files do not have"
    foreign = sum(not pod.owner and pod.node is None for pod in cluster.waiting())
    if foreign:
        yield f"{foreign} waiting pods of others are not placed; the scheduler may place them first"
    if len(cluster.nodes) > _ALL_CANDIDATES and any(attempt.candidates for attempt in outcome.spike):
        yield "with over 100 nodes, the scheduler compares a part of the nodes for preemption, from a random one on"


def _loss(loss: Loss) -> dict[str, Any]:
    return {
        "scope": loss.scope,
        "place": loss.place,
        "cluster": loss.cluster,
        "model": loss.model,
        "unit": loss.unit,
        "peak": loss.demand,
        "capacity": {
            "all_replicas": loss.full,
            "before": loss.before,
            "at_once": loss.at_once,
        },
        "share": {
            "of": "peak" if loss.demand else "all replicas",
            "before": round(loss.share(loss.before), 4),
            "at_once": round(loss.share(loss.at_once), 4),
        },
        "nodes_alike": loss.alike,
        "lost": loss.lost,
    }


def worst(losses: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the drills to show: of single nodes, only the worst of each model and cluster."""
    found: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for loss in losses:
        where = (loss["scope"], loss["cluster"], loss["model"])
        key = where if loss["scope"] == "node" else (*where, loss["place"])
        if key not in found or loss["share"]["at_once"] < found[key]["share"]["at_once"]:
            found[key] = loss
    return list(found.values())
