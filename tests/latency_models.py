"""Latency models that have learned how long batches take."""

from __future__ import annotations

from inferctl.batching.latency_model import LatencyModel


def learned(fixed_s: float, tokens_per_s: float) -> LatencyModel:
    """Return the model of a server whose batches took `fixed_s` and `tokens_per_s`."""
    model = LatencyModel()
    for tokens in [1024, 2048] * 20:
        model.observe(tokens, fixed_s + tokens / tokens_per_s)
    model.fixed, model.per_token = fixed_s, 1 / tokens_per_s  # without rounding, for tests at a limit
    return model
