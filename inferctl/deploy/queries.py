"""The PromQL expressions by which flavors are scaled: each says how many replicas of a flavor are needed.

All three read metrics of the server. Tokens are divided by the rate of a replica, so that one target, 1, fits every
flavor. The backlog alone would oscillate: with an empty queue it asks for the minimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from inferctl.deploy.figure import shown
from inferctl.deploy.plan import FlavorPlan, ModelPlan, Placement, Rate

# Three scrapes of 15 s at least lie in each window.
_RATE_WINDOW = "1m"
_LATENCY_WINDOW = "2m"
# One step adds at most as many replicas as there are: a p99 says that they are too few, not how many are missing.
_LARGEST_STEP = 2


@dataclass(frozen=True)
class Query:
    """A PromQL expression for the replicas of one flavor. `note`: where its numbers come from."""

    name: str
    promql: str
    note: str


@dataclass(frozen=True)
class Link:
    """A flavor in a chain: what it is in one cluster."""

    flavor: FlavorPlan
    placement: Placement

    @property
    def rate(self) -> Rate | None:
        return self.flavor.rate

    @property
    def maximum(self) -> int:
        return int(self.placement.max_replicas.value)


def of(model: ModelPlan, namespace: str, chain: list[Link]) -> list[Query]:
    """Return the queries of the last flavor of `chain`; the others are preferred to it. It must have a rate."""
    last = chain[-1]
    if last.rate is None:
        raise ValueError(f"{last.flavor.name} has no rate")
    earlier = [link for link in chain[:-1] if link.rate and link.maximum]
    pods = f'namespace="{namespace}",service="{model.name}"'
    found = [_offered(model, namespace, pods, earlier, last, last.rate)]
    found.append(_backlog(model, namespace, pods, earlier, last, last.rate))
    own = f'{pods},inferctl_io_flavor="{last.flavor.label}"'
    return [*found, *_latency(model, own)]


def _offered(model: ModelPlan, namespace: str, pods: str, earlier: list[Link], last: Link, rate: Rate) -> Query:
    """Return the offered tokens per second, refused ones too, over the planned rate of a replica."""
    share = model.spec.deploy.utilization
    offered = f"sum(rate(inferctl_offered_tokens_total{{{pods}}}[{_RATE_WINDOW}]))"
    served = _served(namespace, earlier, share)
    promql = f"{_left(offered, served)} / {_number(share * rate.tokens_per_second)}"
    note = f"{shown(share)} (deploy.utilization) x {shown(rate.tokens_per_second)} tokens/s ({rate.origin})"
    return Query("offered", promql, note + _earlier_note(earlier, share))


def _backlog(model: ModelPlan, namespace: str, pods: str, earlier: list[Link], last: Link, rate: Rate) -> Query:
    """Return the waiting tokens over those that a replica computes in the tolerated seconds."""
    seconds = model.spec.deploy.backlog_s
    queued = f"sum(inferctl_queue_tokens{{{pods}}})"
    served = _served(namespace, earlier, seconds)
    promql = f"{_left(queued, served)} / {_number(seconds * rate.tokens_per_second)}"
    note = f"{shown(seconds)} s (deploy.backlog_s) x {shown(rate.tokens_per_second)} tokens/s ({rate.origin})"
    return Query("backlog", promql, note + _earlier_note(earlier, seconds))


def _left(total: str, served: str) -> str:
    return f"clamp_min({total} - ({served}), 0)" if served else total


def _served(namespace: str, earlier: list[Link], factor: float) -> str:
    """Return what the earlier flavors serve at their maximum.

    If pods of one are missing for longer than a cold start, its hardware has run out, and its maximum is fiction: then
    only its available replicas count. That needs kube-state-metrics; without it, the maximum counts.
    """
    terms = []
    for link in earlier:
        assert link.rate
        deployment = f'namespace="{namespace}",deployment="{link.flavor.name}"'
        window = f"{math.ceil(link.flavor.cold_start_s.value)}s"  # Prometheus refuses 0s
        missing = f"min_over_time(kube_deployment_status_replicas_unavailable{{{deployment}}}[{window}]) > 0"
        available = f"kube_deployment_status_replicas_available{{{deployment}}}"
        count = f"(max({available} and on (deployment) ({missing})) or vector({link.maximum}))"
        terms.append(f"{count} * {_number(factor * link.rate.tokens_per_second)}")
    return " + ".join(terms)


def _earlier_note(earlier: list[Link], factor: float) -> str:
    if not earlier:
        return ""
    parts = (
        f"{link.maximum} x {shown(factor)} x {shown(link.rate.tokens_per_second)} of {link.flavor.label}"
        for link in earlier
        if link.rate
    )
    return f"; less what serves before it: {', '.join(parts)}"


def _latency(model: ModelPlan, own: str) -> list[Query]:
    """Return the replicas of the flavor times its p99 over the SLO, if that is above 1.

    Only the flavor's own pods count: a slow flavor says nothing about a fast one. Without requests, the p99 is NaN,
    which no comparison lets through.
    """
    slo, found = model.spec.slo, []
    objectives = [("p99", slo.p99_ms, "inferctl_request_duration_seconds_bucket", ',priority="interactive"')]
    if model.task == "generate":
        objectives.append(("ttft", slo.ttft_ms, "inferctl_phase_duration_seconds_bucket", ',phase="first_token"'))
    for name, bound_ms, metric, extra in objectives:
        if bound_ms is None:
            continue
        quantile = f"histogram_quantile(0.99, sum by (le) (rate({metric}{{{own}{extra}}}[{_LATENCY_WINDOW}])))"
        ratio = f"clamp_max(({quantile} / {_number(bound_ms / 1e3)}) > 1, {_LARGEST_STEP})"
        promql = f"(scalar(count(inferctl_model_info{{{own}}})) * {ratio}) or vector(0)"
        setting = "slo.ttft_ms" if name == "ttft" else "slo.p99_ms"
        found.append(Query(name, promql, f"p99 over {shown(bound_ms)} ms (spec {setting})"))
    return found


def _number(value: float) -> str:
    """Return a number as PromQL reads it, with at most nine digits."""
    return f"{value:.9g}" if value < 1e9 else f"{value:.0f}"
