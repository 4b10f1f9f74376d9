"""The names of the metrics of servers, and which ones an expression reads.

`tests/deploy/test_observe_server.py` compares the names with `/metrics` of running servers.
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
        "inferctl_space_info",
        "inferctl_slo_seconds",
        "inferctl_thread_seconds_total",
        "inferctl_budgets_reached",
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
        "inferctl_engine_flops_total",
        "inferctl_matrix_flops_per_second",
    }
)
SERVER = REQUESTS | OUTBOX | ENCODERS

_LABELS = re.compile(r"\{[^}]*\}|\b(?:by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAME = re.compile(r"\b(?:inferctl_|vllm:|kube_|keda_|DCGM_)\w+")


def used(expression: str) -> set[str]:
    """Return the names of the metrics in an expression of PromQL."""
    return set(_NAME.findall(_LABELS.sub("", expression)))
