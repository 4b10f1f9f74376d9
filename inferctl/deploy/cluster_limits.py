"""What the limits of the clusters leave room for, over all models: maxima, rollouts and overflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from inferctl.core.errors import UsageError
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.figure import Figure, Noted
from inferctl.deploy.plan import FlavorPlan, ModelPlan, Warned


def within_limits(models: Sequence[ModelPlan], clusters: Sequence[Cluster]) -> Warned[tuple[ModelPlan, ...]]:
    """Return the models with the rollouts and the overflow that all clusters have room for.

    What does not fit is a warning. Raises `UsageError` if not even the minima fit.
    """
    found = [_with_surges(model, each) for model in models for each in model.flavors]
    limits = [(cluster, key, limit) for cluster in clusters for key, limit in cluster.max_replicas.items()]
    warnings = [
        warning
        for cluster, key, limit in limits
        for warning in _check_replicas(list(_users(found, cluster, key)), cluster, key, limit)
    ]
    for cluster, key, limit in limits:
        left = limit - _most(found, cluster, key)
        for flavor in _users(found, cluster, key):
            surge = flavor.at(cluster).surge
            if surge and surge > left:
                found[found.index(flavor)] = _changed(flavor, cluster, surge=0)
                warnings.append(
                    f"{cluster.name}: no {key} is left for a rollout of {flavor.name}: it stops a replica before it "
                    "starts the new one. Raise max_replicas of the cluster, or lower that of the flavors"
                )
            else:
                left -= surge
    for cluster, key, limit in limits:
        rollouts = sum(each.at(cluster).surge for each in _users(found, cluster, key))
        left = max(0, limit - _most(found, cluster, key) - rollouts)
        for flavor in _users(found, cluster, key):
            if spare := flavor.at(cluster).overflow:
                found[found.index(flavor)] = _changed(flavor, cluster, overflow=_at_most(left, spare))
                if spare.value > left:
                    warnings.append(
                        f"{cluster.name}: the overflow of {flavor.name} is {left} instead of {spare.value}: the "
                        f"cluster can have {limit} of {key}, and maxima, rollouts and other overflow need the rest"
                    )
                left = max(0, left - int(spare.value))
    bounded = iter(found)
    done = tuple(replace(model, flavors=tuple(next(bounded) for _ in model.flavors)) for model in models)
    return Warned(done, tuple(warnings))


def gpu_quota(models: Sequence[ModelPlan], cluster: Cluster) -> dict[str, Noted]:
    """Return the most GPUs of a cluster by resource: what all flavors may have, with a rollout and the overflow.

    It is at most what the cluster can have of each kind of hardware.
    """
    users: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for flavor in (each for model in models for each in model.flavors):
        placed = flavor.at(cluster)
        if placed.resource and placed.max_replicas.value:
            overflow = placed.overflow.value if placed.overflow else 0
            each = placed.resource.count
            count = int(placed.max_replicas.value + placed.surge + overflow) * each
            users.setdefault((placed.resource.name, flavor.hardware.key), []).append((flavor.name, count, each))
    parts: dict[str, list[tuple[int, str]]] = {}
    for (name, key), found in users.items():
        total, formula = sum(count for _, count, _ in found), " + ".join(f"{count} {user}" for user, count, _ in found)
        limit = cluster.max_replicas.get(key)
        most = total if limit is None else min(total, limit * max(each for _, _, each in found))
        parts.setdefault(name, []).append((most, formula if most == total else f"min({most}, {formula})"))
    return {
        name: Noted(
            str(sum(count for count, _ in found)),
            f"{' + '.join(formula for _, formula in found)}: maximum, rollout and overflow",
        )
        for name, found in parts.items()
    }


def _with_surges(model: ModelPlan, flavor: FlavorPlan) -> FlavorPlan:
    """Return the flavor with the additional pods of its rollouts.

    On a GPU, a pod stops first, unless its cluster could be left with none. A new image changes all flavors at once, so
    one of them must have two replicas.
    """
    placements = []
    for index, placed in enumerate(flavor.placements):
        most = max(int(each.placements[index].min_replicas.value) for each in model.flavors)
        needed = flavor.hardware.kind == "cpu" or most < 2
        placements.append(replace(placed, surge=1 if needed and placed.max_replicas.value else 0))
    return replace(flavor, placements=tuple(placements))


def _users(flavors: Sequence[FlavorPlan], cluster: Cluster, key: str) -> Iterator[FlavorPlan]:
    return (each for each in list(flavors) if each.hardware.key == key and each.at(cluster).max_replicas.value)


def _most(flavors: Sequence[FlavorPlan], cluster: Cluster, key: str) -> int:
    return sum(int(each.at(cluster).max_replicas.value) for each in _users(flavors, cluster, key))


def _at_most(left: int, spare: Figure) -> Figure | None:
    if spare.value <= left:
        return spare
    formula = f"min({left}, {spare.formula or spare.value})"
    source = f"{spare.source}; max_replicas of the clusters file"
    return replace(spare, value=left, formula=formula, source=source) if left else None


def _changed(flavor: FlavorPlan, cluster: Cluster, **changes: Any) -> FlavorPlan:
    """Return the flavor with fields of its placement in `cluster` replaced."""
    placements = (replace(each, **changes) if each.cluster == cluster.name else each for each in flavor.placements)
    return replace(flavor, placements=tuple(placements))


def _check_replicas(users: Sequence[FlavorPlan], cluster: Cluster, key: str, limit: int) -> Iterator[str]:
    """Yield a warning if the maxima exceed the limit. Raises `UsageError` if the minima do."""
    if len(users) < 2:
        return
    placed = [each.at(cluster) for each in users]
    least = sum(int(each.min_replicas.value) for each in placed)
    most = sum(int(each.max_replicas.value) for each in placed)
    names = " and ".join(each.name for each in users)
    if least > limit:
        raise UsageError(
            f"{cluster.name} can have {limit} of {key}, but {names} need {least} at their minimum",
            "lower min_replicas, or raise max_replicas of the cluster. A minimum that is not set follows from "
            "deploy.traffic and the rate of the flavor",
        )
    if most > limit:
        yield (
            f"{cluster.name} can have {limit} of {key}, but the maxima of {names} add up to {most}: "
            "the first to ask gets them. Set max_replicas of the flavors"
        )
