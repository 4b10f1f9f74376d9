"""How long batches take: `seconds = fixed + tokens / rate`, learnt from each batch that finishes. Knows no clock: times are arguments."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferctl.errors import UsageError

# What one more batch leaves of the weight of those before it: about the last thirty count.
_KEEP = 0.97
# A batch that took this many times longer or shorter than expected counts as if it had been at that border: one stall teaches little,
# a new pace is still learnt within a few batches.
_FAR = 3.0
_SEED_WEIGHT = 20.0
_SEED_TOKENS = 2048


@dataclass(frozen=True)
class Capacity:
    """What a measurement found: seconds a batch costs whatever is in it, tokens a second beyond that, and the latency it held.

    `parallel_batches` and `max_batch_tokens` are how it was measured; the server has its own.
    """

    fixed_s: float
    tokens_per_s: float
    slo_p99_ms: float | None = None
    parallel_batches: int | None = None
    max_batch_tokens: int | None = None

    @classmethod
    def read(cls, file: Path) -> Capacity:
        """A JSON object with `fixed_s`, `tokens_per_s` and, if it likes, the others; more is ignored. Raises `UsageError`."""
        hint = '--capacity takes what `inferctl capacity` writes, or JSON like {"fixed_s": 0.004, "tokens_per_s": 15000, "slo_p99_ms": 200}'
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{file} cannot be read: {error}", hint) from None
        if not isinstance(data, dict):
            raise UsageError(f"{file} holds no JSON object", hint)
        slo = data.get("slo_p99_ms")
        return cls(
            _number(file, hint, "fixed_s", data.get("fixed_s"), zero=True),
            _number(file, hint, "tokens_per_s", data.get("tokens_per_s")),
            None if slo is None else _number(file, hint, "slo_p99_ms", slo),
            _whole(file, hint, "parallel_batches", data.get("parallel_batches")),
            _whole(file, hint, "max_batch_tokens", data.get("max_batch_tokens")),
        )


def _number(file: Path, hint: str, name: str, value: Any, *, zero: bool = False) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not right or value < 0 or (value == 0 and not zero):
        least = "no less than zero" if zero else "above zero"
        raise UsageError(f"{file}: {name} must be a number {least}, got {value!r}", hint)
    return float(value)


def _whole(file: Path, hint: str, name: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UsageError(f"{file}: {name} must be a whole number above zero, got {value!r}", hint)
    return value


class Pace:
    """Least squares over (tokens, seconds) with forgetting. Equal observations give equal answers."""

    def __init__(self, capacity: Capacity | None = None) -> None:
        self.fixed, self.per_token = 0.0, 0.0
        self._weight = self._t = self._s = self._tt = self._ts = 0.0
        if capacity is not None:
            for tokens in (0, _SEED_TOKENS):
                self._add(tokens, capacity.fixed_s + tokens / capacity.tokens_per_s, _SEED_WEIGHT)
            self._fit()

    @property
    def known(self) -> bool:
        """Whether anything was seen or given."""
        return self._weight > 0

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a finished batch."""
        if seconds <= 0:
            return
        if self.known and (expected := self.seconds(tokens)) > 0:
            seconds = min(max(seconds, expected / _FAR), expected * _FAR)
        for name in ("_weight", "_t", "_s", "_tt", "_ts"):
            setattr(self, name, getattr(self, name) * _KEEP)
        self._add(tokens, seconds, 1.0)
        self._fit()

    def seconds(self, tokens: int, batch_tokens: int | None = None) -> float:
        """What `tokens` take, in batches of `batch_tokens` (one batch when None); 0 for no tokens, and before anything is known."""
        batches = math.ceil(tokens / batch_tokens) if batch_tokens else min(tokens, 1)
        return batches * self.fixed + tokens * self.per_token

    def _add(self, tokens: int, seconds: float, weight: float) -> None:
        self._weight += weight
        self._t += weight * tokens
        self._s += weight * seconds
        self._tt += weight * tokens * tokens
        self._ts += weight * tokens * seconds

    def _fit(self) -> None:
        spread = self._weight * self._tt - self._t * self._t
        if spread > 1e-3 * self._weight * self._tt:
            self.per_token = (self._weight * self._ts - self._t * self._s) / spread
            self.fixed = (self._s - self.per_token * self._t) / self._weight
            if self.per_token > 0 and self.fixed >= 0:
                return
        # Batches of about one size, or noise, say nothing of the fixed part.
        self.fixed, self.per_token = 0.0, self._s / self._t
