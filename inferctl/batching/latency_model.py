"""The batch latency model: `seconds = fixed + tokens / rate`, fitted to each completed batch. It has no clock."""

from __future__ import annotations

import math

# Each new batch multiplies the weight of earlier ones by this, so that about the last 30 batches count.
_DECAY = 0.97
# A batch that took more than this many times longer or shorter than predicted counts as if it had taken exactly that.
# One stall then changes little, and the model still follows a lasting change within a few batches.
_MAX_RATIO = 3.0
# After this many batches, the first values have 6% of the weight.
_OWN_BATCHES = 100


class LatencyModel:
    """A least-squares fit over (tokens, seconds) in which older batches count less. Equal input gives equal output."""

    def __init__(self) -> None:
        self.fixed, self.per_token = 0.0, 0.0
        self._batches = 0
        self._weight = self._t = self._s = self._tt = self._ts = 0.0

    @property
    def known(self) -> bool:
        """Whether the model has any data."""
        return self._weight > 0

    def to_json(self) -> dict[str, float | None]:
        """Return the model as `pace` of `GET /info`."""
        rate = round(1 / self.per_token, 1) if self.per_token else None
        return {"fixed_s": round(self.fixed, 6), "tokens_per_s": rate}

    def observe(self, tokens: int, seconds: float) -> None:
        """Update the model with a completed batch."""
        if seconds <= 0:
            return
        if self.known and (expected := self.seconds(tokens)) > 0:
            seconds = min(max(seconds, expected / _MAX_RATIO), expected * _MAX_RATIO)
        for name in ("_weight", "_t", "_s", "_tt", "_ts"):
            setattr(self, name, getattr(self, name) * _DECAY)
        self._add(tokens, seconds, 1.0)
        self._fit()
        self._batches += 1

    def seconds(self, tokens: int, batch_tokens: int | None = None) -> float:
        """Return the predicted seconds of `tokens`, in batches of `batch_tokens` (one batch if None).

        The prediction is 0 for no tokens and while the model has no data.
        """
        batches = math.ceil(tokens / batch_tokens) if batch_tokens else min(tokens, 1)
        return batches * self.fixed + tokens * self.per_token

    def tokens(self, seconds: float) -> float:
        """Return the tokens of a batch that takes `seconds`; infinity while the model has no data."""
        return max(0.0, seconds - self.fixed) / self.per_token if self.per_token else math.inf

    def tokens_per_second(self, batch_tokens: int, parallel: int) -> float | None:
        """Return the tokens per second in full batches, `parallel` at a time; None before 100 batches.

        It is too low while only small batches ran, because these do not show which part of a batch is fixed.
        """
        return parallel * batch_tokens / self.seconds(batch_tokens) if self._batches >= _OWN_BATCHES else None

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
        # Batches of about one size, or noisy times, do not determine the fixed part.
        self.fixed, self.per_token = 0.0, self._s / self._t
