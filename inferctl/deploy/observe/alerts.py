"""The alerts of a model, as rules for Prometheus. docs/observability.md says what to do about each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from inferctl.deploy.observe.watched import Watched, WatchedFlavor

# A percentile of fewer requests says little.
_FEW_REQUESTS = 100
# Seconds of queued work, as a multiple of those from which the autoscaler adds replicas.
_BACKLOG = 5
_REJECTED = 0.01
_KEY_LIMITED = 0.05
_ERRORS = 0.01
_OUTBOX_S = 900
_PREEMPTIONS = 0.1
_NOT_READY_S = 300
# The codes of rejections that more replicas would avoid.
REASONS = "queue_full|key_share|max_wait|slo|too_many_requests|too_many_bytes|tokenizer_full"

Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True)
class Alert:
    """One alert. `seconds`: how long `expression` must have a result. `summary` can use `$labels` and `$value`.

    `flavor`: the Deployment that it is about; None for the whole model.
    """

    name: str
    expression: str
    seconds: int
    severity: Severity
    summary: str
    flavor: str | None = None

    def rule(self, watched: Watched) -> dict[str, Any]:
        """Return the rule for Prometheus."""
        labels = {"severity": self.severity, "namespace": watched.namespace, "model": watched.name}
        return {
            "alert": self.name,
            "expr": self.expression,
            "for": f"{self.seconds}s",
            "labels": labels | ({"flavor": self.flavor} if self.flavor else {}),
            "annotations": {"summary": f"{watched.name}: {self.summary}"},
        }


def alerts(watched: Watched) -> list[Alert]:
    """Return the alerts of a model. Only alerts of different flavors have the same name."""
    found = [*_service(watched), *_engines(watched), *_replicas(watched), *_scaling(watched), *_usage(watched)]
    found += _encoders(watched) if watched.task != "generate" else _generation(watched)
    return found + ([_gpu_error(watched)] if watched.gpu else [])


def groups(watched: Watched) -> dict[str, Any]:
    """Return a plain rule file for Prometheus."""
    rules = [alert.rule(watched) for alert in alerts(watched)]
    return {"groups": [{"name": f"inferctl.{watched.namespace}.{watched.name}", "rules": rules}]}


def _service(watched: Watched) -> Iterator[Alert]:
    series = watched.series
    yield Alert(
        "InferctlLatencyAboveSlo",
        _quantile_above("inferctl_request_duration_seconds", f'{series},endpoint!="other",priority="interactive"')
        + f'> max(inferctl_slo_seconds{{{series},objective="request_p99"}})\n'
        + _enough(f'inferctl_request_duration_seconds_count{{{series},endpoint!="other",priority="interactive"}}'),
        300,
        "critical",
        "the p99 of interactive requests is {{ $value | humanizeDuration }}, above the SLO",
    )
    yield Alert(
        "InferctlRejected",
        f'sum(rate(inferctl_rejected_total{{{series},reason=~"{REASONS}"}}[5m]))\n'
        f"/ sum(rate(inferctl_requests_total{{{series}}}[5m])) > {_REJECTED}",
        300,
        "critical",
        "{{ $value | humanizePercentage }} of requests are rejected for lack of capacity",
    )
    yield Alert(
        "InferctlKeyLimitReached",
        f'sum(rate(inferctl_rejected_total{{{series},reason="rate_limit_exceeded"}}[15m]))\n'
        f"/ sum(rate(inferctl_requests_total{{{series}}}[15m])) > {_KEY_LIMITED}",
        900,
        "info",
        "{{ $value | humanizePercentage }} of requests exceed the limit of their key",
    )
    yield Alert(
        "InferctlServerErrors",
        f'sum(rate(inferctl_requests_total{{{series},status=~"5.."}}[5m]))\n'
        f"/ sum(rate(inferctl_requests_total{{{series}}}[5m])) > {_ERRORS}",
        300,
        "critical",
        "{{ $value | humanizePercentage }} of requests get a status of 500 or above",
    )
    yield Alert(
        "InferctlMetricsMissing",
        f"sum(kube_deployment_status_replicas_available{{{watched.deployments}}})\n"
        f"> (count(inferctl_engine_up{{{series}}}) or vector(0))",
        600,
        "critical",
        "Prometheus has no metrics of some of {{ $value }} available replicas, so the autoscaler sees too little work",
    )


def _engines(watched: Watched) -> Iterator[Alert]:
    series = watched.series
    yield Alert(
        "InferctlEngineRestarted",
        f"max by (pod) (changes(inferctl_engine_restarts{{{series}}}[15m])) > 0",
        0,
        "warning",
        "the engine of {{ $labels.pod }} was restarted",
    )
    yield Alert(
        "InferctlEngineCrashLoop",
        f"max by (pod) (changes(inferctl_engine_restarts{{{series}}}[15m])) > 2",
        0,
        "critical",
        "the engine of {{ $labels.pod }} was restarted {{ $value }} times in 15 minutes",
    )
    yield Alert(
        "InferctlContainerCrashLoop",
        f"max by (pod, container) (increase(kube_pod_container_status_restarts_total{{{watched.pods()}}}[15m])) > 1.5",
        0,
        "critical",
        "the container {{ $labels.container }} of {{ $labels.pod }} was restarted several times in 15 minutes",
    )
    yield Alert(
        "InferctlContainerOutOfMemory",
        "max by (pod, container) (kube_pod_container_status_last_terminated_reason"
        f'{{{watched.pods()},reason="OOMKilled"}}) == 1\n'
        "and on (pod, container) "
        f"increase(kube_pod_container_status_restarts_total{{{watched.pods()}}}[15m]) > 0",
        0,
        "critical",
        "the container {{ $labels.container }} of {{ $labels.pod }} exceeded its memory limit",
    )


def _replicas(watched: Watched) -> Iterator[Alert]:
    deployments = watched.deployments
    yield Alert(
        "InferctlNoReplica",
        f"sum(kube_deployment_status_replicas_available{{{deployments}}}) == 0\n"
        f"and sum(kube_deployment_spec_replicas{{{deployments}}}) > 0",
        120,
        "critical",
        "no replica is available",
    )
    yield Alert(
        "InferctlPodsNotCreated",
        f"sum by (deployment) (kube_deployment_spec_replicas{{{deployments}}})\n"
        f"> sum by (deployment) (kube_deployment_status_replicas{{{deployments}}})",
        300,
        "critical",
        "Kubernetes does not create the pods of {{ $labels.deployment }}",
    )
    for flavor in watched.flavors:
        yield Alert(
            "InferctlPodPending",
            f'max by (pod) (kube_pod_status_phase{{{watched.pods(flavor)},phase="Pending"}}) == 1',
            flavor.cold_start_s,
            "critical",
            f"{{{{ $labels.pod }}}} is pending longer than a cold start of {flavor.cold_start_s} s",
            flavor.name,
        )
        seconds = max(_NOT_READY_S, 2 * flavor.load_s)
        yield Alert(
            "InferctlPodNotReady",
            f'max by (pod) (kube_pod_status_ready{{{watched.pods(flavor)},condition="true"}}) == 0\n'
            f'and on (pod) kube_pod_status_phase{{{watched.pods(flavor)},phase="Running"}} == 1',
            seconds,
            "critical",
            f"{{{{ $labels.pod }}}} runs, but is not ready after {seconds} s",
            flavor.name,
        )
        if flavor.overflow:
            yield _overflow(watched, flavor, flavor.overflow)


def _overflow(watched: Watched, flavor: WatchedFlavor, deployment: str) -> Alert:
    placeholders = f'namespace="{watched.namespace}",deployment="{deployment}"'
    return Alert(
        "InferctlOverflowUsedUp",
        f"sum(kube_deployment_status_replicas_available{{{placeholders}}}) == 0\n"
        f"and sum(kube_deployment_spec_replicas{{{placeholders}}}) > 0",
        flavor.cold_start_s,
        "warning",
        f"no placeholder of {flavor.name} is left, so the next replica waits for a cold start",
        flavor.name,
    )


def _scaling(watched: Watched) -> Iterator[Alert]:
    autoscalers = watched.autoscalers
    desired = f"kube_horizontalpodautoscaler_status_desired_replicas{{{autoscalers}}}"
    most = f"kube_horizontalpodautoscaler_spec_max_replicas{{{autoscalers}}}"
    least = f"kube_horizontalpodautoscaler_spec_min_replicas{{{autoscalers}}}"
    by = "by (horizontalpodautoscaler)"
    yield Alert(
        "InferctlFlavorAtMaximum",
        f"max {by} ({desired}) >= max {by} ({most})\nand max {by} ({most}) > max {by} ({least})",
        900,
        "info",
        "{{ $labels.horizontalpodautoscaler }} is at its maximum of {{ $value }} replicas",
    )
    yield Alert(
        "InferctlAllFlavorsAtMaximum",
        f"sum({desired}) >= sum({most})\nand sum({most}) > sum({least})",
        300,
        "critical",
        "all flavors are at their maximum, {{ $value }} replicas in total",
    )
    yield Alert(
        "InferctlScalingInactive",
        "max by (horizontalpodautoscaler) (kube_horizontalpodautoscaler_status_condition"
        f'{{{autoscalers},condition="ScalingActive",status="false"}}) == 1\n'
        f"and max {by} ({desired}) > 0",  # KEDA itself scales from and to 0
        300,
        "critical",
        "{{ $labels.horizontalpodautoscaler }} cannot compute its number of replicas",
    )
    if watched.keda:
        names = "|".join(flavor.name for flavor in watched.flavors)
        yield Alert(
            "InferctlScalerErrors",
            f'sum by (scaledObject) (increase(keda_scaler_detail_errors_total{{scaledObject=~"{names}"}}[10m])) > 0',
            300,
            "critical",
            "KEDA cannot read a metric of {{ $labels.scaledObject }} and uses its fallback",
        )


def _usage(watched: Watched) -> Iterator[Alert]:
    if not watched.metering:
        return
    yield Alert(
        "InferctlOutboxOld",
        f"max by (pod) (inferctl_outbox_age_seconds{{{watched.series}}}) > {_OUTBOX_S}",
        300,
        "warning",
        "usage events of {{ $labels.pod }} wait for {{ $value | humanizeDuration }}",
    )
    yield Alert(
        "InferctlUsageEventsDropped",
        f"max by (pod) (increase(inferctl_outbox_dropped_events{{{watched.series}}}[15m])) > 0",
        0,
        "critical",
        "{{ $labels.pod }} lost usage events",
    )


def _encoders(watched: Watched) -> Iterator[Alert]:
    series, backlog = watched.series, watched.backlog_s * _BACKLOG
    fitted = f'inferctl_capacity_tokens_per_second{{{series},source="fitted"}}'
    yield Alert(
        "InferctlBacklog",
        f"sum(inferctl_queue_tokens{{{series}}}) / sum({fitted}) > {backlog:g}",
        300,
        "critical",
        "the queues hold {{ $value | humanizeDuration }} of work",
    )
    yield Alert(
        "InferctlNonFiniteVectors",
        f"max by (pod) (increase(inferctl_non_finite_total{{{series}}}[15m])) > 0",
        0,
        "critical",
        "the model in {{ $labels.pod }} returned NaN or infinity",
    )
    yield Alert(
        "InferctlDeviceOutOfMemory",
        f"max by (pod) (increase(inferctl_out_of_memory_total{{{series}}}[15m])) > 0",
        0,
        "warning",
        "batches of {{ $labels.pod }} did not fit into the memory of its device",
    )
    yield Alert(
        "InferctlModelsDiffer",
        f"count(count by (sha256) (inferctl_model_info{{{series}}})) > 1",
        3600,
        "warning",
        "replicas serve {{ $value }} different models under one name",
    )
    if watched.shared_cache:
        yield Alert(
            "InferctlSharedCacheDown",
            f"min by (pod) (inferctl_cache_shared_up{{{series}}}) == 0",
            300,
            "warning",
            "{{ $labels.pod }} does not reach the shared level of the cache",
        )


def _generation(watched: Watched) -> Iterator[Alert]:
    series = watched.series
    yield Alert(
        "InferctlFirstTokenAboveSlo",
        _quantile_above("inferctl_phase_duration_seconds", f'{series},phase="first_token"')
        + f'> max(inferctl_slo_seconds{{{series},objective="first_token"}})\n'
        + _enough(f'inferctl_phase_duration_seconds_count{{{series},phase="first_token"}}'),
        300,
        "critical",
        "the p99 of the time to the first token is {{ $value | humanizeDuration }}, above the SLO",
    )
    yield Alert(
        "InferctlBacklog",
        f"sum(inferctl_requests_waiting{{{series}}}) > sum(inferctl_requests_in_flight{{{series}}}) / 2",
        300,
        "critical",
        "{{ $value }} requests wait, more than run",
    )
    yield Alert(
        "InferctlKvCacheFull",
        f"max by (pod) (rate(vllm:num_preemptions_total{{{series}}}[5m])) > {_PREEMPTIONS}",
        900,
        "warning",
        "the KV cache of {{ $labels.pod }} is too small: running requests are preempted and computed again",
    )


def _gpu_error(watched: Watched) -> Alert:
    names = watched.pod_names()
    # Prometheus renames the labels of the pod if it does not keep those of the exporter.
    return Alert(
        "InferctlGpuError",
        f'max by (pod) (changes(DCGM_FI_DEV_XID_ERRORS{{pod=~"{names}"}}[15m])) > 0\n'
        f'or max by (exported_pod) (changes(DCGM_FI_DEV_XID_ERRORS{{exported_pod=~"{names}"}}[15m])) > 0',
        0,
        "warning",
        "the GPU of {{ or $labels.pod $labels.exported_pod }} reported an Xid error",
    )


def _quantile_above(name: str, labels: str) -> str:
    return f"histogram_quantile(0.99, sum by (le) (rate({name}_bucket{{{labels}}}[10m])))\n"


def _enough(counter: str) -> str:
    return f"and sum(increase({counter}[10m])) > {_FEW_REQUESTS}"
