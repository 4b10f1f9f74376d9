"""The names of the metrics that dashboards and alerts use, and where each comes from.

`tests/deploy/test_observe_server.py` compares the names of the server with `/metrics` of running servers. The names of
other exporters are from their documentation, listed here with its address.
"""

from __future__ import annotations

import re

# Of every inferctl server.
REQUESTS = frozenset(
    {
        "inferctl_requests_total",
        "inferctl_request_duration_seconds_bucket",
        "inferctl_request_duration_seconds_count",
        "inferctl_request_duration_seconds_sum",
        "inferctl_phase_duration_seconds_bucket",
        "inferctl_phase_duration_seconds_count",
        "inferctl_phase_duration_seconds_sum",
        "inferctl_tokens_total",
        "inferctl_output_tokens_total",
        "inferctl_broken_streams_total",
        "inferctl_inputs_total",
        "inferctl_rejected_total",
        "inferctl_cancelled_total",
        "inferctl_offered_tokens_total",
        "inferctl_queue_tokens",
        "inferctl_requests_waiting",
        "inferctl_requests_in_flight",
        "inferctl_engine_up",
        "inferctl_engine_restarts",
        "inferctl_model_info",
        "inferctl_slo_seconds",
        "inferctl_thread_seconds_total",
    }
)
# Of servers that record usage events.
OUTBOX = frozenset({"inferctl_outbox_events", "inferctl_outbox_age_seconds", "inferctl_outbox_dropped_events"})
# Of servers of all tasks but generation.
ENCODERS = frozenset(
    {
        "inferctl_inputs_truncated_total",
        "inferctl_non_finite_total",
        "inferctl_engine_deaths_total",
        "inferctl_batch_failures_total",
        "inferctl_out_of_memory_total",
        "inferctl_batch_limit_tokens",
        "inferctl_capacity_tokens_per_second",
        "inferctl_cache_hits_total",
        "inferctl_cache_misses_total",
        "inferctl_cache_coalesced_total",
        "inferctl_cache_bytes",
        "inferctl_batch_tokens_bucket",
        "inferctl_batch_tokens_count",
        "inferctl_batch_tokens_sum",
        "inferctl_batch_sequences_bucket",
        "inferctl_batch_sequences_count",
        "inferctl_batch_sequences_sum",
        "inferctl_batch_duration_seconds_bucket",
        "inferctl_batch_duration_seconds_count",
        "inferctl_batch_duration_seconds_sum",
    }
)
# Of vLLM 0.32, in `/metrics` of servers of generation: https://docs.vllm.ai/en/latest/usage/metrics/
VLLM = frozenset(
    {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:inter_token_latency_seconds_bucket",
    }
)
# Of kube-state-metrics: https://github.com/kubernetes/kube-state-metrics/tree/main/docs/metrics
KUBE_STATE = frozenset(
    {
        "kube_deployment_spec_replicas",
        "kube_deployment_status_replicas",
        "kube_deployment_status_replicas_available",
        "kube_horizontalpodautoscaler_spec_max_replicas",
        "kube_horizontalpodautoscaler_spec_min_replicas",
        "kube_horizontalpodautoscaler_status_condition",
        "kube_horizontalpodautoscaler_status_desired_replicas",
        "kube_pod_container_status_last_terminated_reason",
        "kube_pod_container_status_restarts_total",
        "kube_pod_status_phase",
        "kube_pod_status_ready",
    }
)
# Of the operator of KEDA, from 2.14: https://keda.sh/docs/latest/integrations/prometheus/
KEDA = frozenset({"keda_scaler_detail_errors_total"})
# Of DCGM Exporter: https://docs.nvidia.com/datacenter/dcgm/latest/reference/dcgm-exporter-metrics.html
DCGM = frozenset({"DCGM_FI_DEV_XID_ERRORS", "DCGM_FI_DEV_FB_USED", "DCGM_FI_PROF_GR_ENGINE_ACTIVE"})
SERVER = REQUESTS | OUTBOX | ENCODERS
ALL = SERVER | VLLM | KUBE_STATE | KEDA | DCGM

_LABELS = re.compile(r"\{[^}]*\}|\b(?:by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAME = re.compile(r"\b(?:inferctl_|vllm:|kube_|keda_|DCGM_)\w+")


def used(expression: str) -> set[str]:
    """Return the names of the metrics in an expression of PromQL."""
    return set(_NAME.findall(_LABELS.sub("", expression)))
