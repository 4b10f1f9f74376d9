"""Places the flavors of a model in a cluster: replicas, spare capacity and GPU resource, with warnings.

`cluster_limits.py` then bounds rollouts and overflow by what a cluster has for all models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from inferctl.config.deploy_spec import Flavor
from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.deploy import gpu, sizing
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.figure import shown
from inferctl.deploy.plan import FlavorPlan, Placement, TrafficPlan, Warned

# More is a wrong number in the spec or in a receipt.
_MOST_REPLICAS = 100_000


def place(
    spec: Spec,
    flavors: Sequence[Flavor],
    planned: Sequence[FlavorPlan],
    traffic: TrafficPlan | None,
    cluster: Cluster,
) -> Warned[list[Placement]]:
    """Return the placement of each flavor in `cluster`."""
    settings, share = spec.deploy, cluster.share or 0.0
    chain = [
        sizing.Demand(
            each.label,
            each.rate,
            flavor.min_replicas,
            flavor.max_replicas,
            cluster.max_replicas.get(each.hardware.key),
        )
        for flavor, each in zip(flavors, planned, strict=True)
    ]
    scaled = settings.scaling != "none"
    sized = sizing.replicas(chain, traffic, share, settings.utilization, scaled=scaled)
    _refuse_too_many(planned, sized, cluster)
    warnings = _uncovered_peak(spec, chain, sized, traffic, cluster)
    if scaled and any(each.most.value for each in sized) and not any(each.least.value for each in sized):
        warnings.append(
            f"{cluster.name}: all flavors of {spec.name} may have 0 replicas. The metrics that start one come from the "
            "servers, so nothing notices the first request: set min_replicas: 1 of a flavor"
        )
    first = _first_with_room(sized, settings.overflow)
    found = []
    for index, (each, counts) in enumerate(zip(planned, sized, strict=True)):
        spare = None
        if index == first:
            room = int(counts.most.value - counts.least.value) if scaled else 0
            spare = sizing.overflow(
                settings.overflow, traffic, share, settings.traffic.rise_s, each.cold_start_s, each.rate, room
            )
        fixed = None
        if counts.most.value == 0:
            fixed = replace(counts.most, name="replicas")
        elif not scaled or each.rate is None:
            fixed = replace(counts.least, name="replicas")
        found.append(
            Placement(
                cluster=cluster.name,
                resource=gpu.resource(each.hardware, each.resource.count, cluster, each.shared_by)
                if each.resource and counts.most.value
                else each.resource,
                min_replicas=counts.least,
                max_replicas=counts.most,
                replicas=fixed,
                at_base=counts.at_base,
                at_peak=counts.at_peak,
                overflow=spare,
            )
        )
    return Warned(found, tuple(warnings))


def _refuse_too_many(planned: Sequence[FlavorPlan], sized: Sequence[sizing.Replicas], cluster: Cluster) -> None:
    for flavor, counts in zip(planned, sized, strict=True):
        for figure in (counts.at_peak, counts.most):
            if figure and figure.value > _MOST_REPLICAS:
                raise UsageError(
                    f"{cluster.name}: {flavor.name} needs {figure.value:,} {figure.name}, more than "
                    f"{_MOST_REPLICAS:,}: {figure.formula}",
                    "correct deploy.traffic, or the rate of the flavor",
                )


def _first_with_room(sized: Sequence[sizing.Replicas], setting: str | int) -> int | None:
    """Return the flavor that gets the overflow: the first that can grow; for a given number, the first that exists."""
    grows = [index for index, each in enumerate(sized) if each.most.value > each.least.value]
    exists = [index for index, each in enumerate(sized) if each.most.value]
    return next(iter(grows if setting == "auto" else exists), None)


def running_at_peak(placed: Placement) -> int:
    """Return the replicas at the peak, at least the minimum; those of the autoscaler if nothing else sets them."""
    needed = placed.at_peak.value if placed.at_peak else placed.max_replicas.value
    return int(max(placed.min_replicas.value, min(placed.max_replicas.value, needed)))


def _uncovered_peak(
    spec: Spec,
    chain: Sequence[sizing.Demand],
    sized: Sequence[sizing.Replicas],
    traffic: TrafficPlan | None,
    cluster: Cluster,
) -> list[str]:
    """Return a warning if all replicas at their maximum cannot serve the peak, else nothing."""
    share = cluster.share or 0.0
    if traffic is None or share == 0:
        return []
    served = sum(
        float(counts.most.value) * spec.deploy.utilization * demand.rate.tokens_per_second
        for demand, counts in zip(chain, sized, strict=True)
        if demand.rate
    )
    peak = float(traffic.peak.value) * share
    if served >= peak * (1 - 1e-9):
        return []
    return [
        f"{cluster.name}: all replicas at their maximum serve {served / peak:.0%} of the peak of {spec.name} "
        f"({shown(served)} of {shown(peak)} tokens/s): raise max_replicas or the share of other clusters"
    ]
