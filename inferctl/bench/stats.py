"""Percentiles from exact records, with the interval that the sample supports, or the reason why there is none.

Order statistics only: a percentile is a latency that was measured, and its interval lies between two that were measured.
Source of the interval: the number of samples below the true quantile is binomial (H. A. David, Order Statistics, section 7.1), for independent
samples. Requests that queue behind each other are not. What their dependence does to a quantile is what it does to the share of samples over it
(P. Heidelberger and P. A. W. Lewis, Operations Research 32, 1984), and that is seen in batch means (R. W. Conway, Management Science 10, 1963).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95

# About so many batches in all: enough to know the variance between them, and each long enough to hold what depends on each other. Fewer than
# `_FEWEST` say nothing.
_BATCHES, _SMALLEST, _FEWEST = 30, 5, 8
_NORMAL = 1.959964
# From so many runs on, the differences between them are tested; 75 % point of the normal distribution.
_FEWEST_RUNS, _POOLED = 3, 0.674490


@dataclass(frozen=True)
class Quantile:
    """`value` with its two-sided 95 % interval [`low`, `high`]; all None when `n` samples are fewer than `needed`.

    `dependence`: the n samples say as much as n / dependence independent ones, and the interval is as wide; None where nothing is known of it.
    """

    q: float
    n: int
    needed: int
    value: float | None
    low: float | None
    high: float | None
    dependence: float | None = None

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


def interval_ranks(n: int, q: float, confidence: float = CONFIDENCE, dependence: float = 1.0) -> tuple[int, int] | None:
    """Ranks (from 1) between which the true quantile lies with at least `confidence`; None when n is too small.

    A `dependence` over 1 is a factor of the variance: both lie its square root times as far from n * q, but no further than the sample reaches.
    """
    if n < needed(q, confidence):
        return None
    alpha = (1 - confidence) / 2
    start, mass = _binomial(n, q)
    below = np.cumsum(mass)
    # The quantile is under the sample of rank r when fewer than r samples lie below it: P(B <= r - 1).
    low = start + int(np.searchsorted(below, alpha, side="right"))
    high = start + int(np.searchsorted(below, 1 - alpha, side="left")) + 1
    if dependence == 1:
        return low, high
    wider, centre = math.sqrt(dependence), n * q
    return max(1, math.floor(centre - wider * (centre - low))), min(n, math.ceil(centre + wider * (high - centre)))


def quantile(
    ascending: npt.NDArray[np.float64] | Sequence[float],
    q: float,
    confidence: float = CONFIDENCE,
    series: Sequence[npt.NDArray[np.float64]] = (),
) -> Quantile:
    """The q-quantile of samples sorted in ascending order, in their unit.

    `series`: the same samples run by run, each run's in the order in which they arose. The interval is then as wide as their dependence makes it;
    without, they are taken to be independent.
    """
    n, least = len(ascending), needed(q, confidence)
    if n < least:
        return Quantile(q, n, least, None, None, None)
    value = float(ascending[rank(n, q) - 1])
    found = dependence(series, value)
    ranks = interval_ranks(n, q, confidence, found or 1.0)
    assert ranks
    low, high = (float(ascending[one - 1]) for one in ranks)
    return Quantile(q, n, least, value, low, high, found)


def effective(n: int, dependence: float | None) -> int:
    """Return the effective sample size: n autocorrelated samples say as much as so many independent ones."""
    return int(n / (dependence or 1))


def dependence(series: Sequence[npt.NDArray[np.float64]], value: float) -> float | None:
    """By how much the share of samples over `value` varies more than that of independent samples would: a factor of the variance, at least 1.

    It is the variance between about thirty batches of neighbours, none of which spans two runs of `series`, over the binomial one, times what
    Student's t makes of so many batches. None when there are fewer than eight. What changes more slowly than a batch
    lasts is seen in part. Where three or more runs differ by more than the batches explain, the runs are the batches.
    """
    runs = [run for run in series if len(run)]
    most = math.ceil(_BATCHES / max(1, len(runs)))
    batches = [batch for run in runs for batch in np.array_split(run, min(most, max(1, len(run) // _SMALLEST)))]
    if len(batches) < _FEWEST:
        return None
    sizes = np.array([len(batch) for batch in batches], np.float64)
    # Where many samples equal the value, those at it tell what those over it do not.
    over, at_least = (
        np.array([above(batch, value).sum() for batch in batches]) for above in (np.greater, np.greater_equal)
    )
    ends = np.cumsum([min(most, max(1, len(run) // _SMALLEST)) for run in runs])[:-1]
    return max(1.0, *(_inflation(counts, sizes, ends) for counts in (over, at_least)))


def _inflation(counts: npt.NDArray[Any], sizes: npt.NDArray[np.float64], ends: npt.NDArray[Any]) -> float:
    """Return the variance of counts in batches over the binomial one, times (Student's t / the normal's)**2.

    `ends` splits the batches into runs. 0 when all or none count.
    """
    within = _variance_ratio(counts, sizes)
    found = within * (student_t(len(sizes) - 1) / _NORMAL) ** 2
    if not within or not _FEWEST_RUNS <= len(ends) + 1 < len(sizes):
        return found
    groups = [np.array([part.sum() for part in np.split(values, ends)]) for values in (counts, sizes)]
    between, degrees = _variance_ratio(*groups), len(ends)
    if _differ(between / within, degrees, len(sizes) - 1 - degrees):
        found = max(found, between * (student_t(degrees) / _NORMAL) ** 2)
    return found


def _variance_ratio(counts: npt.NDArray[Any], sizes: npt.NDArray[np.float64]) -> float:
    share, degrees = counts.sum() / sizes.sum(), len(sizes) - 1
    if share in (0.0, 1.0):
        return 0.0
    spread = np.sum((counts - share * sizes) ** 2) * (1 + 1 / degrees)
    return float(spread / (sizes.sum() * share * (1 - share)))


def _differ(ratio: float, degrees: int, others: int) -> bool:
    """Return whether a ratio of variances exceeds the 75 % point of F (E. Paulson, Ann. Math. Statist. 13, 1942).

    A test that decides which variance to use needs such a low level (T. A. Bancroft, Biometrics 20, 1964): at 95 %,
    differences that it misses would make intervals too narrow.
    """
    a, b, root = 2 / (9 * degrees), 2 / (9 * others), ratio ** (1 / 3)
    return bool(((1 - b) * root - (1 - a)) / math.sqrt(b * root**2 + a) > _POOLED)


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
    z = _NORMAL
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
