"""Computes among how many servers the limit of a key is divided.

Without a broker, each server applies limit / servers. With one, the servers that hear each other share the whole limit,
and the number only says how many there are at least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from inferctl.config.spec import Spec
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.endpoints import endpoint, limits_broker
from inferctl.deploy.figure import Figure
from inferctl.deploy.placement import running_at_peak
from inferctl.deploy.plan import FlavorPlan, Warned

_NAME = "servers that divide the limit of a key"
# The setting of the server ends here.
_MOST = 10_000
# A server hears at most 2 x replicas + 16 others (`tenancy/access/limits.py`), so that nobody can invent any number.
_MORE_OTHERS = 16


def servers(spec: Spec, flavors: Sequence[FlavorPlan], clusters: Sequence[Cluster]) -> Warned[Figure | None]:
    """Return the servers among which the limit of a key is divided; None without keys and limits.

    Without a broker, those at the peak in all clusters. (The maxima would be too many, because each flavor can stand in
    for all others.) With a broker, those that always run, because servers that hear each other count as well. Warnings
    are about what a key gets.
    """
    limited = bool(spec.access.requests_per_minute or spec.access.tokens_per_minute)
    if not spec.access.required and not limited:
        return Warned(None)
    if url := limits_broker(spec):
        return _with_broker(spec, flavors, clusters, url)
    placements = [placed for each in flavors for placed in each.placements if placed.max_replicas.value]
    counts = [
        count
        for placed in placements
        if (count := int(placed.replicas.value) if placed.replicas else running_at_peak(placed))
    ]
    value = min(_MOST, max(1, sum(counts)))
    warnings = []
    if limited:
        least = sum(int((placed.replicas or placed.min_replicas).value) for placed in placements)
        warnings.append(
            f"{spec.name}: without access.broker, each server applies 1/{value} of the limit of a key, for the "
            f"{value} replicas at the peak. With the {least} of the minima, a key gets {min(1, least / value):.0%} of "
            "it"
        )
    formula = " + ".join(map(str, counts)) if len(counts) > 1 else ""
    source = "replicas at the peak in all clusters, at least the minima; each server applies limit / servers"
    return Warned(Figure(_NAME, value, "servers", formula, source), tuple(warnings))


def _with_broker(
    spec: Spec, flavors: Sequence[FlavorPlan], clusters: Sequence[Cluster], url: str
) -> Warned[Figure | None]:
    """Return the servers that always hear each other: of each cluster, or of all if they have one broker."""
    apart = len(clusters) > 1 and endpoint(url, spec.deploy.namespace).namespace is not None
    minima, peaks = [], []
    for cluster in clusters:
        placements = [placed for each in flavors if (placed := each.at(cluster)).max_replicas.value]
        fixed = [(placed, placed.replicas) for placed in placements]
        minima.append(sum(int((given or placed.min_replicas).value) for placed, given in fixed))
        peaks.append(sum(int(given.value) if given else running_at_peak(placed) for placed, given in fixed))
    used = [count for count in minima if count] or [1]
    least, peak = (min(used), max(peaks)) if apart else (sum(used), sum(peaks))
    heard = math.ceil((peak - 1 - _MORE_OTHERS) / 2)
    value = min(_MOST, max(1, least, heard))
    listed = ", ".join(map(str, used)) if apart else " + ".join(map(str, used))
    formula = (f"min({listed})" if apart else listed) if len(used) > 1 else ""
    if heard > least:
        formula = f"max({formula or least}, ceil(({peak} - {1 + _MORE_OTHERS}) / 2))"
    warnings = []
    if spec.access.requests_per_minute or spec.access.tokens_per_minute:
        if apart:
            warnings.append(
                f"{spec.name}: {url} is a Service of each cluster, so servers of other clusters are not heard, and a "
                f"key gets its limit in each of the {len(clusters)} clusters"
            )
        if peak > value:
            warnings.append(
                f"{spec.name}: if the broker of limits fails at the peak of {peak} servers, each applies 1/{value} of "
                f"the limit of a key, so all together up to {peak / value:.1f} times the limit"
            )
    where = "in the smallest cluster" if apart else "in all clusters"
    source = f"minima {where}; those that are heard count too. Without the broker, each applies limit / servers"
    return Warned(Figure(_NAME, value, "servers", formula, source), tuple(warnings))
