"""Percentiles from exact records, with the interval that the sample supports, or the reason why there is none.

Order statistics only: a percentile is a latency that was measured, and its interval lies between two that were measured.
Source of the interval: the number of samples below the true quantile is binomial (H. A. David, Order Statistics, section 7.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Quantile:
    """`value` with its two-sided 95 % interval [`low`, `high`]; all None when `n` samples are fewer than `needed`."""

    q: float
    n: int
    needed: int
    value: float | None
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """Why there is no number, or an empty string."""
        return "" if self.value is not None else f"n too small: {self.n} of {self.needed}"


def needed(q: float, confidence: float = CONFIDENCE) -> int:
    """Fewest samples for which the two-sided interval of the q-quantile is finite on both sides: 368 for p99 at 95 %."""
    alpha = (1 - confidence) / 2
    return max(math.ceil(math.log(alpha) / math.log(p)) for p in (q, 1 - q))


def rank(n: int, q: float) -> int:
    """Rank (from 1) of the q-quantile among `n` sorted samples: the smallest one that has at least q of them at or below it."""
    # 0.99 * 100 is 99.00000000000001 in floating point; the tolerance keeps the rank at 99.
    return min(n, max(1, math.ceil(n * q - 1e-9)))


def interval_ranks(n: int, q: float, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """Ranks (from 1) between which the true quantile lies with at least `confidence`; None when n is too small."""
    if n < needed(q, confidence):
        return None
    alpha = (1 - confidence) / 2
    start, mass = _binomial(n, q)
    below = np.cumsum(mass)
    # The quantile is under the sample of rank r when fewer than r samples lie below it: P(B <= r - 1).
    low = start + int(np.searchsorted(below, alpha, side="right"))
    high = start + int(np.searchsorted(below, 1 - alpha, side="left")) + 1
    return (low, high) if low >= 1 and high <= n else None


def quantile(
    ascending: npt.NDArray[np.float64] | Sequence[float], q: float, confidence: float = CONFIDENCE
) -> Quantile:
    """The q-quantile of samples sorted in ascending order, in their unit."""
    n = len(ascending)
    ranks = interval_ranks(n, q, confidence)
    if ranks is None:
        return Quantile(q, n, needed(q, confidence), None, None, None)
    low, high = ranks
    value = float(ascending[rank(n, q) - 1])
    return Quantile(q, n, needed(q, confidence), value, float(ascending[low - 1]), float(ascending[high - 1]))


def curve(ascending: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
    """Points (share, value) of the empirical distribution, for a chart: every half per cent, finer towards the end as far as n goes."""
    n = len(ascending)
    if not n:
        return []
    shares = [step / 200 for step in range(1, 200)] + [
        1 - 10**-exponent * step for exponent in (3, 4, 5) for step in (5, 2, 1)
    ]
    points = {share: float(ascending[rank(n, share) - 1]) for share in shares if n * (1 - share) >= 1 - 1e-9}
    return [(0.0, float(ascending[0])), *sorted(points.items()), (1.0, float(ascending[-1]))]


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and half-width of its 95 % interval (Student's t); None for fewer than three values."""
    n = len(values)
    if n < 3:
        return None
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, student_t(n - 1) * math.sqrt(variance / n)


def student_t(degrees: int) -> float:
    """97.5 % point of Student's t: tabulated up to 10 degrees of freedom, then the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5)."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    if degrees <= len(table):
        return table[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _binomial(n: int, q: float) -> tuple[int, npt.NDArray[np.float64]]:
    """Probabilities of a binomial variable around its mean, and the count that the first one belongs to.

    Twelve standard deviations to either side: what lies outside is below 1e-20.
    """
    mean, spread = n * q, 12 * math.sqrt(n * q * (1 - q)) + 20
    start, end = max(0, math.floor(mean - spread)), min(n, math.ceil(mean + spread))
    counts = np.arange(start, end + 1)
    first = (
        math.lgamma(n + 1)
        - math.lgamma(start + 1)
        - math.lgamma(n - start + 1)
        + start * math.log(q)
        + (n - start) * math.log1p(-q)
    )
    steps = np.log((n - counts[:-1]) / (counts[:-1] + 1)) + math.log(q) - math.log1p(-q)
    return start, np.exp(first + np.concatenate([[0.0], np.cumsum(steps)]))
