"""The PromQL expressions by which flavors are scaled: each says how many replicas of a flavor are needed.

All three read metrics of the server. Tokens are divided by the rate of a replica, so that one target, 1, fits every
flavor. The backlog alone would oscillate: with an empty queue it asks for the minimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inferctl.config.spec import Spec
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.figure import shown
from inferctl.deploy.plan import FlavorPlan, ModelPlan

# Three scrapes of 15 s at least lie in each window.
_RATE_WINDOW = "1m"
_LATENCY_WINDOW = "2m"
# One step adds at most as many replicas as there are: a p99 says that they are too few, not how many are missing.
_LARGEST_STEP = 2
# Seconds of queued work per replica from which replicas are added.
BACKLOG_S = 1.0


@dataclass(frozen=True)
class Query:
    """A PromQL expression for the replicas of one flavor. `note`: where its numbers come from."""

    name: str
    promql: str
    note: str


@dataclass(frozen=True)
class _Earlier:
    """A flavor that serves before another one, with at most `maximum` replicas at `rate` tokens per second."""

    flavor: FlavorPlan
    maximum: int
    rate: float


def of(model: ModelPlan, chain: Sequence[FlavorPlan], cluster: Cluster, namespace: str) -> list[Query]:
    """Return the queries of the last flavor of `chain` in `cluster`; the others are preferred to it. All have rates."""
    *preferred, last = chain
    if last.rate is None:
        raise ValueError(f"{last.name} has no rate")
    counts = [(each, int(each.at(cluster).max_replicas.value)) for each in preferred]
    earlier = [_Earlier(each, most, each.rate.tokens_per_second) for each, most in counts if each.rate and most]
    series = f'namespace="{namespace}",service="{model.name}"'
    share = model.spec.deploy.utilization
    # Refused tokens are offered too.
    offered = f"sum(rate(inferctl_offered_tokens_total{{{series}}}[{_RATE_WINDOW}]))"
    queued = f"sum(inferctl_queue_tokens{{{series}}})"
    own = f'{series},inferctl_io_flavor="{last.label}"'
    return [
        _tokens("offered", offered, share, f"{shown(share)} (deploy.utilization)", last, earlier, namespace),
        _tokens("backlog", queued, BACKLOG_S, f"{shown(BACKLOG_S)} s", last, earlier, namespace),
        *(query for each in model.spec.each() for query in _latency(model, each, own)),
    ]


def _tokens(
    name: str, total: str, factor: float, what: str, flavor: FlavorPlan, earlier: Sequence[_Earlier], namespace: str
) -> Query:
    """Return the tokens `total`, less what the earlier flavors serve, over `factor` times the rate of a replica."""
    assert flavor.rate
    rate = flavor.rate.tokens_per_second
    served = " + ".join(_served(each, factor, namespace) for each in earlier)
    left = f"clamp_min({total} - ({served}), 0)" if served else total
    note = f"{what} x {shown(rate)} tokens/s ({flavor.rate.origin})"
    if earlier:
        parts = (f"{each.maximum} x {shown(factor)} x {shown(each.rate)} of {each.flavor.label}" for each in earlier)
        note += f"; less what serves before it: {', '.join(parts)}"
    return Query(name, f"{left} / {_number(factor * rate)}", note)


def _served(earlier: _Earlier, factor: float, namespace: str) -> str:
    """Return what an earlier flavor serves at its maximum.

    If pods of it are missing for longer than a cold start, its hardware has run out, and its maximum is fiction: then
    only its available replicas count. That needs kube-state-metrics; without it, the maximum counts.
    """
    deployment = f'namespace="{namespace}",deployment="{earlier.flavor.name}"'
    window = f"{math.ceil(earlier.flavor.cold_start_s.value)}s"  # Prometheus refuses 0s
    missing = f"min_over_time(kube_deployment_status_replicas_unavailable{{{deployment}}}[{window}]) > 0"
    available = f"kube_deployment_status_replicas_available{{{deployment}}}"
    count = f"(max({available} and on (deployment) ({missing})) or vector({earlier.maximum}))"
    return f"{count} * {_number(factor * earlier.rate)}"


def _latency(model: ModelPlan, spec: Spec, own: str) -> list[Query]:
    """Return the replicas of the flavor times the p99 of one model over its SLO, if that is above 1.

    Only the flavor's own pods count: a slow flavor says nothing about a fast one. Without requests, the p99 is NaN,
    which no comparison lets through.
    """
    slo, found = spec.slo, []
    of = ""
    if model.spec.models:
        own, of = f'{own},model="{spec.name}"', f"-{spec.name}"
    objectives = [("p99", slo.p99_ms, "inferctl_request_duration_seconds_bucket", ',priority="interactive"')]
    if "generate" in model.tasks:
        objectives.append(("ttft", slo.ttft_ms, "inferctl_phase_duration_seconds_bucket", ',phase="first_token"'))
    for name, bound_ms, metric, extra in objectives:
        if bound_ms is None:
            continue
        quantile = f"histogram_quantile(0.99, sum by (le) (rate({metric}{{{own}{extra}}}[{_LATENCY_WINDOW}])))"
        ratio = f"clamp_max(({quantile} / {_number(bound_ms / 1e3)}) > 1, {_LARGEST_STEP})"
        promql = f"(scalar(count(inferctl_model_info{{{own}}})) * {ratio}) or vector(0)"
        setting = "slo.ttft_ms" if name == "ttft" else "slo.p99_ms"
        found.append(Query(f"{name}{of}", promql, f"p99 over {shown(bound_ms)} ms (spec {setting})"))
    return found


def _number(value: float) -> str:
    """Return a number as PromQL reads it, with at most nine digits."""
    return f"{value:.9g}" if value < 1e9 else f"{value:.0f}"
