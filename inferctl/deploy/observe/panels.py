"""The panels of a dashboard: their queries, units and descriptions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from inferctl.deploy.observe.watched import Watched

_RATE = "$__rate_interval"


@dataclass(frozen=True)
class Query:
    """One query of a panel. `legend` can use labels, such as `{{status}}`."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A graph over time. `unit`: a unit of Grafana, such as `s` or `reqps`."""

    title: str
    unit: str
    description: str
    queries: tuple[Query, ...]
    stacked: bool = False


def rows(watched: Watched) -> Iterator[tuple[str, list[Panel]]]:
    """Yield the rows of the dashboard of a model: title and panels."""
    yield "Requests", _requests(watched)
    yield "Work", _work(watched)
    if watched.task == "generate":
        yield "Generation", _generation(watched)
    else:
        yield "Engines", _encoders(watched)
    yield "Replicas", _replicas(watched)
    if watched.cache:
        yield "Cache", _cache(watched)
    if watched.metering:
        yield "Usage events", _outbox(watched)
    if watched.gpu:
        yield "GPUs", _gpus(watched)


def _requests(watched: Watched) -> list[Panel]:
    series = watched.series
    latency = f'inferctl_request_duration_seconds_bucket{{{series},endpoint!="other",priority="interactive"}}'
    return [
        Panel(
            "Requests by status",
            "reqps",
            "499: the client disconnected. 429: see the rejections.",
            (Query(f"sum by (status) (rate(inferctl_requests_total{{{series}}}[{_RATE}]))", "{{status}}"),),
            stacked=True,
        ),
        Panel(
            "Latency of interactive requests",
            "s",
            "From the last byte of a request to its successful response. Bulk requests have no SLO.",
            (
                Query(_quantile(0.5, latency), "p50"),
                Query(_quantile(0.99, latency), "p99"),
                Query(f'max(inferctl_slo_seconds{{{series},objective="request_p99"}})', "SLO of the p99"),
            ),
        ),
        Panel(
            "Rejections by reason",
            "reqps",
            "rate_limit_exceeded: limits of keys. The others: too little capacity.",
            (Query(f"sum by (reason) (rate(inferctl_rejected_total{{{series}}}[{_RATE}]))", "{{reason}}"),),
            stacked=True,
        ),
    ]


def _work(watched: Watched) -> list[Panel]:
    series = watched.series
    offered = f"sum(rate(inferctl_offered_tokens_total{{{series}}}[{_RATE}]))"
    served = (
        f"sum(rate(inferctl_tokens_total{{{series}}}[{_RATE}]))"
        f" + sum(rate(inferctl_output_tokens_total{{{series}}}[{_RATE}]))"
    )
    queries = [Query(offered, "offered, with rejected requests"), Query(served, "served")]
    planned = _planned(watched)
    if planned:
        queries.append(planned)
    if watched.task != "generate":
        rates = f"sum by (source) (inferctl_capacity_tokens_per_second{{{series}}})"
        queries.append(Query(rates, "full batches: {{source}}"))
    found = [
        _queue(watched),
        Panel(
            "Tokens per second",
            "short",
            "Offered tokens that the servers did not tokenize are estimated. Planned: the available replicas times the "
            "rate in the plan. Served tokens include those from a cache; offered ones do not.",
            tuple(queries),
        ),
    ]
    if planned:
        share = Query(f"{offered} / ({planned.expression})", "offered / planned")
        description = "The autoscaler keeps this at deploy.utilization, unless all flavors are at their maximum."
        found.append(Panel("Use of the planned rate", "percentunit", description, (share,)))
    return found


def _queue(watched: Watched) -> Panel:
    series = watched.series
    if watched.task == "generate":
        return Panel(
            "Requests that wait and run",
            "short",
            "Requests in flight include those that wait in vLLM.",
            (
                Query(f"sum(inferctl_requests_waiting{{{series}}})", "waiting"),
                Query(f"sum(inferctl_requests_in_flight{{{series}}})", "in flight"),
            ),
        )
    work = (
        f"sum by (inferctl_io_flavor) (inferctl_queue_tokens{{{series}}}) / "
        f'sum by (inferctl_io_flavor) (inferctl_capacity_tokens_per_second{{{series},source="fitted"}})'
    )
    return Panel(
        "Queued work",
        "s",
        "Waiting tokens divided by the tokens per second of full batches, by flavor.",
        (Query(work, "{{inferctl_io_flavor}}"),),
    )


def _planned(watched: Watched) -> Query | None:
    """Return the planned rate of the available replicas; None if the rate of a flavor is not known."""
    rates = [(flavor, flavor.rate) for flavor in watched.flavors if flavor.rate]
    if len(rates) < len(watched.flavors):
        return None
    parts = [
        f'(sum(kube_deployment_status_replicas_available{{namespace="{watched.namespace}",'
        f'deployment="{flavor.name}"}}) or vector(0)) * {rate:.10g}'
        for flavor, rate in rates
    ]
    source = "receipts" if all(flavor.measured for flavor in watched.flavors) else "partly assumed"
    return Query(" + ".join(parts), f"planned ({source})")


def _encoders(watched: Watched) -> list[Panel]:
    series = watched.series
    problems = {
        "non-finite inputs": "inferctl_non_finite_total",
        "batches out of memory": "inferctl_out_of_memory_total",
        "failed batches": "inferctl_batch_failures_total",
        "truncated inputs": "inferctl_inputs_truncated_total",
    }
    batch = f"inferctl_batch_duration_seconds_bucket{{{series}}}"
    return [
        Panel(
            "Tokens per batch",
            "short",
            "Batches grow with the load. The limit is lowered after running out of memory.",
            (
                Query(
                    f"sum by (inferctl_io_flavor) (rate(inferctl_batch_tokens_sum{{{series}}}[{_RATE}])) / "
                    f"sum by (inferctl_io_flavor) (rate(inferctl_batch_tokens_count{{{series}}}[{_RATE}]))",
                    "mean: {{inferctl_io_flavor}}",
                ),
                Query(f"min(inferctl_batch_limit_tokens{{{series}}})", "lowest limit"),
            ),
        ),
        Panel(
            "Time of a batch",
            "s",
            "Time in the engine.",
            (Query(_quantile(0.5, batch), "p50"), Query(_quantile(0.99, batch), "p99")),
        ),
        Panel(
            "Problems of inputs and batches",
            "cps",
            "Inputs with NaN or infinity, batches that failed or did not fit, inputs that were too long.",
            tuple(Query(f"sum(rate({name}{{{series}}}[{_RATE}]))", legend) for legend, name in problems.items()),
        ),
    ]


def _generation(watched: Watched) -> list[Panel]:
    series = watched.series
    first = f'inferctl_phase_duration_seconds_bucket{{{series},phase="first_token"}}'
    gaps = f"vllm:inter_token_latency_seconds_bucket{{{series}}}"
    hits, asked = (f"sum(rate(vllm:prefix_cache_{name}_total{{{series}}}[{_RATE}]))" for name in ("hits", "queries"))
    return [
        Panel(
            "Time to the first token",
            "s",
            "Of streams.",
            (
                Query(_quantile(0.5, first), "p50"),
                Query(_quantile(0.99, first), "p99"),
                Query(f'max(inferctl_slo_seconds{{{series},objective="first_token"}})', "SLO"),
            ),
        ),
        Panel(
            "Time between tokens",
            "s",
            "As vLLM measures it, without the way to the client.",
            (
                Query(_quantile(0.5, gaps), "p50"),
                Query(_quantile(0.99, gaps), "p99"),
                Query(f'max(inferctl_slo_seconds{{{series},objective="token_gap"}})', "SLO"),
            ),
        ),
        Panel(
            "Tokens of vLLM",
            "short",
            "Per second. Prompt tokens count when their prompt is complete.",
            (
                Query(f"sum(rate(vllm:prompt_tokens_total{{{series}}}[{_RATE}]))", "prompt"),
                Query(f"sum(rate(vllm:generation_tokens_total{{{series}}}[{_RATE}]))", "generated"),
            ),
        ),
        Panel(
            "KV cache",
            "percentunit",
            "If the cache is full, running requests are preempted.",
            (
                Query(f"max by (pod) (vllm:kv_cache_usage_perc{{{series}}})", "used: {{pod}}"),
                Query(f"{hits} / {asked}", "prompt tokens from the prefix cache"),
            ),
        ),
        Panel(
            "Preemptions",
            "cps",
            "A preempted request is computed again.",
            (Query(f"sum by (pod) (rate(vllm:num_preemptions_total{{{series}}}[{_RATE}]))", "{{pod}}"),),
        ),
        Panel(
            "Requests in vLLM",
            "short",
            "Running ones share the batches; waiting ones have no place in the KV cache yet.",
            (
                Query(f"sum(vllm:num_requests_running{{{series}}})", "running"),
                Query(f"sum(vllm:num_requests_waiting{{{series}}})", "waiting"),
            ),
        ),
    ]


def _replicas(watched: Watched) -> list[Panel]:
    deployments, pods = watched.deployments, watched.pods()
    return [
        Panel(
            "Replicas by flavor",
            "short",
            "Available ones, and the sum that the autoscalers want.",
            (
                Query(
                    f"sum by (deployment) (kube_deployment_status_replicas_available{{{deployments}}})",
                    "{{deployment}}",
                ),
                Query(f"sum(kube_deployment_spec_replicas{{{deployments}}})", "desired, all"),
                Query(f"sum(kube_horizontalpodautoscaler_spec_max_replicas{{{watched.autoscalers}}})", "maximum, all"),
            ),
        ),
        Panel(
            "Pods that do not serve",
            "short",
            "Pending pods wait for a node, an image or a GPU.",
            (
                Query(f'sum(kube_pod_status_phase{{{pods},phase="Pending"}})', "pending"),
                Query(
                    f'sum(kube_pod_status_ready{{{pods},condition="true"}} == bool 0'
                    f' and on (pod) kube_pod_status_phase{{{pods},phase="Running"}} == 1)',
                    "running, not ready",
                ),
            ),
        ),
        Panel(
            "Restarts",
            "short",
            "In 15 minutes. An engine restarts in its pod; a container restarts if the server ends.",
            (
                Query(f"sum by (pod) (changes(inferctl_engine_restarts{{{watched.series}}}[15m]))", "engine: {{pod}}"),
                Query(
                    f"sum by (pod) (increase(kube_pod_container_status_restarts_total{{{pods}}}[15m]))",
                    "container: {{pod}}",
                ),
            ),
        ),
    ]


def _cache(watched: Watched) -> list[Panel]:
    series = watched.series
    hits, misses, joined = (
        f"sum(rate(inferctl_cache_{name}_total{{{series}}}[{_RATE}]))" for name in ("hits", "misses", "coalesced")
    )
    found = [
        Panel(
            "Inputs from the cache",
            "percentunit",
            "Share of inputs that no engine computed, with equal inputs in flight.",
            (Query(f"({hits} + {joined}) / ({hits} + {joined} + {misses})", "cached"),),
        ),
        Panel(
            "Memory of the cache",
            "bytes",
            "Cached vectors in the memory of the servers.",
            (Query(f"sum(inferctl_cache_bytes{{{series}}})", "vectors"),),
        ),
    ]
    if watched.shared_cache:
        failures = Query(f"sum(rate(inferctl_cache_shared_failures_total{{{series}}}[{_RATE}]))", "failed calls/s")
        up = Query(f"min(inferctl_cache_shared_up{{{series}}})", "1: used by all replicas")
        found.append(Panel("Shared level", "short", "Without it, each replica has its own cache only.", (up, failures)))
    return found


def _outbox(watched: Watched) -> list[Panel]:
    series = watched.series
    return [
        Panel(
            "Age of the oldest usage event",
            "s",
            "That the ledger does not have.",
            (Query(f"max by (pod) (inferctl_outbox_age_seconds{{{series}}})", "{{pod}}"),),
        ),
        Panel(
            "Usage events in outboxes",
            "short",
            "Waiting ones, and those that were lost because an outbox could not be written.",
            (
                Query(f"sum(inferctl_outbox_events{{{series}}})", "waiting"),
                Query(f"sum(inferctl_outbox_dropped_events{{{series}}})", "dropped"),
            ),
        ),
    ]


def _gpus(watched: Watched) -> list[Panel]:
    def both(name: str) -> tuple[Query, ...]:
        """Return the queries for both names that Prometheus can give to the label of the pod."""
        return tuple(
            Query(f'max by ({label}) ({name}{{{label}=~"{watched.pod_names()}"}})', f"{{{{{label}}}}}")
            for label in ("pod", "exported_pod")
        )

    return [
        Panel(
            "Busy time of the GPU",
            "percentunit",
            "From DCGM Exporter. Not for scaling: it is high before the queue grows, and some MIG setups report 0.",
            both("DCGM_FI_PROF_GR_ENGINE_ACTIVE"),
        ),
        Panel("Memory of the GPU", "decmbytes", "From DCGM Exporter.", both("DCGM_FI_DEV_FB_USED")),
    ]


def _quantile(share: float, buckets: str) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({buckets}[{_RATE}])))"
