"""Percentiles of exact records with 95% intervals, and the sample size that each of them needs.

Order statistics only: a percentile is a measured latency, and so are both ends of its interval. The interval for
independent samples: the number of samples below the true quantile is binomial (H. A. David, Order Statistics, section
7.1). The latencies of requests that queue behind each other are autocorrelated. This widens the interval of a quantile
as much as that of the share of samples above it (P. Heidelberger and P. A. W. Lewis, Operations Research 32, 1984).
The variance of that share is estimated from batch means (R. W. Conway, Management Science 10, 1963).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inferctl.bench import student_t

CONFIDENCE = 0.95

# About 30 batches in all: enough to estimate the variance between them, while each is long enough to contain the
# autocorrelation. A batch has five samples or more. With fewer than eight batches there is no estimate.
_BATCHES, _MIN_BATCH_SIZE, _MIN_BATCHES = 30, 5, 8
# 97.5% and 75% points of the normal distribution.
_NORMAL_975, _NORMAL_75 = 1.959964, 0.674490
# The fewest windows for an interval of their mean, and the standard errors by which their autocorrelation is raised.
_MIN_WINDOWS, _RAISED_BY = 8, 0.7
# With three runs or more, the differences between runs are tested.
_MIN_RUNS = 3


@dataclass(frozen=True)
class Quantile:
    """The `q`-quantile of `n` samples with its two-sided 95% interval [`low`, `high`].

    `value`, `low` and `high` are None if `n` is less than `needed`. The interval was widened by `variance_inflation`:
    the effective sample size is n / variance_inflation. It is None where it is unknown.
    """

    q: float
    n: int
    needed: int
    value: float | None
    low: float | None
    high: float | None
    variance_inflation: float | None = None


def needed(q: float, confidence: float = CONFIDENCE) -> int:
    """Return the smallest sample whose two-sided interval of the q-quantile is finite: 368 for the p99 at 95%."""
    alpha = (1 - confidence) / 2
    return max(math.ceil(math.log(alpha) / math.log(p)) for p in (q, 1 - q))


def rank(n: int, q: float) -> int:
    """Return the rank (from 1) of the q-quantile of `n` sorted samples: the first with a share q at or below it."""
    # 0.99 * 100 is 99.00000000000001 in floating point; the tolerance keeps the rank at 99.
    return min(n, max(1, math.ceil(n * q - 1e-9)))


def interval_ranks(
    n: int, q: float, confidence: float = CONFIDENCE, variance_inflation: float = 1.0
) -> tuple[int, int] | None:
    """Return the ranks (from 1) between which the true quantile lies with at least `confidence`.

    The distance of both ranks from n * q is multiplied by the square root of `variance_inflation`, within the sample.
    None if n is not enough.
    """
    if n < needed(q, confidence):
        return None
    alpha = (1 - confidence) / 2
    start, mass = _binomial(n, q)
    below = np.cumsum(mass)
    # The quantile is under the sample of rank r when fewer than r samples lie below it: P(B <= r - 1).
    low = start + int(np.searchsorted(below, alpha, side="right"))
    high = start + int(np.searchsorted(below, 1 - alpha, side="left")) + 1
    if variance_inflation == 1:
        return low, high
    factor, center = math.sqrt(variance_inflation), n * q
    return max(1, math.floor(center - factor * (center - low))), min(n, math.ceil(center + factor * (high - center)))


def quantile(
    ascending: npt.NDArray[np.float64] | Sequence[float],
    q: float,
    confidence: float = CONFIDENCE,
    series: Sequence[npt.NDArray[np.float64]] = (),
) -> Quantile:
    """Return the q-quantile of samples that are sorted in ascending order, in their unit.

    `series` has the same samples, one array per run in time order. With it, autocorrelation widens the interval.
    Without it, the samples count as independent.
    """
    n, least = len(ascending), needed(q, confidence)
    if n < least:
        return Quantile(q, n, least, None, None, None)
    value = float(ascending[rank(n, q) - 1])
    inflation = variance_inflation(series, value)
    ranks = interval_ranks(n, q, confidence, inflation or 1.0)
    assert ranks
    low, high = (float(ascending[number - 1]) for number in ranks)
    return Quantile(q, n, least, value, low, high, inflation)


def effective_size(n: int, inflation: float | None) -> int:
    """Return the effective sample size: the number of independent samples with the information of n correlated ones."""
    return int(n / (inflation or 1))


def variance_inflation(series: Sequence[npt.NDArray[np.float64]], value: float) -> float | None:
    """Return the variance inflation factor of the share of samples above `value`, relative to independent samples.

    It is 1 or more: the variance between about 30 batches of consecutive samples, divided by the binomial variance and
    corrected for the number of batches by Student's t. No batch spans two runs of `series`. Changes that take longer
    than a batch are seen in part. If three or more runs differ by more than the batches explain, the runs are the
    batches. None with fewer than eight batches.
    """
    runs = [run for run in series if len(run)]
    most = math.ceil(_BATCHES / max(1, len(runs)))
    counts_of_batches = [min(most, max(1, len(run) // _MIN_BATCH_SIZE)) for run in runs]
    batches = [
        batch for run, count in zip(runs, counts_of_batches, strict=True) for batch in np.array_split(run, count)
    ]
    if len(batches) < _MIN_BATCHES:
        return None
    sizes = np.array([len(batch) for batch in batches], np.float64)
    # Many samples may equal the value: the count of those at or above it then varies where the count above it does not.
    above, at_least = (
        np.array([compare(batch, value).sum() for batch in batches]) for compare in (np.greater, np.greater_equal)
    )
    ends = np.cumsum(counts_of_batches)[:-1]
    return max(1.0, *(_inflation(counts, sizes, ends) for counts in (above, at_least)))


def _inflation(counts: npt.NDArray[Any], sizes: npt.NDArray[np.float64], ends: npt.NDArray[Any]) -> float:
    """Return the variance of counts in batches over the binomial one, times (Student's t / normal point)**2.

    `ends` splits the batches into runs. The result is 0 if all samples or none are counted.
    """
    within = _variance_ratio(counts, sizes)
    inflation = within * _small_sample_factor(len(sizes) - 1)
    if not within or not _MIN_RUNS <= len(ends) + 1 < len(sizes):
        return inflation
    groups = [np.array([group.sum() for group in np.split(values, ends)]) for values in (counts, sizes)]
    between, degrees = _variance_ratio(*groups), len(ends)
    if _differ(between / within, degrees, len(sizes) - 1 - degrees):
        inflation = max(inflation, between * _small_sample_factor(degrees))
    return inflation


def _small_sample_factor(degrees: int) -> float:
    """Return (Student's t / normal point)**2: the variance of few batches is itself uncertain."""
    return (_t(degrees) / _NORMAL_975) ** 2


def _variance_ratio(counts: npt.NDArray[Any], sizes: npt.NDArray[np.float64]) -> float:
    """Return the variance of counts in batches over that of a binomial variable; 0 if all samples or none count."""
    share, degrees = counts.sum() / sizes.sum(), len(sizes) - 1
    if share in (0.0, 1.0):
        return 0.0
    spread = np.sum((counts - share * sizes) ** 2) * (1 + 1 / degrees)
    return float(spread / (sizes.sum() * share * (1 - share)))


def _differ(ratio: float, degrees: int, other_degrees: int) -> bool:
    """Return whether a ratio of variances exceeds the 75% point of F (E. Paulson, Ann. Math. Statist. 13, 1942).

    A test that decides which variance to use needs such a low level (T. A. Bancroft, Biometrics 20, 1964): at 95%,
    differences that it misses would make intervals too narrow.
    """
    a, b, root = 2 / (9 * degrees), 2 / (9 * other_degrees), ratio ** (1 / 3)
    return bool(((1 - b) * root - (1 - a)) / math.sqrt(b * root**2 + a) > _NORMAL_75)


def curve(ascending: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
    """Return points (share, value) of the empirical distribution for a chart.

    One point per half percent, and finer steps toward the end as far as the sample allows.
    """
    n = len(ascending)
    if not n:
        return []
    shares = [step / 200 for step in range(1, 200)] + [
        1 - 10**-exponent * step for exponent in (3, 4, 5) for step in (5, 2, 1)
    ]
    points = {share: float(ascending[rank(n, share) - 1]) for share in shares if n * (1 - share) >= 1 - 1e-9}
    return [(0.0, float(ascending[0])), *sorted(points.items()), (1.0, float(ascending[-1]))]


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the mean and the half-width of its 95% interval (Student's t); None with fewer than three values."""
    n = len(values)
    if n < 3:
        return None
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, _t(n - 1) * math.sqrt(variance / n)


def ratio_interval(sums: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Return the half-width of the 95% interval of sum(sums) / sum(sizes); None with fewer than three groups.

    The values within a group may depend on each other, the groups not (ratio estimator of cluster sampling, W. G.
    Cochran, Sampling Techniques, section 6.3).
    """
    n, total = len(sums), sum(sizes)
    if n < 3 or not total:
        return None
    ratio = math.fsum(sums) / total
    squares = math.fsum((value - ratio * size) ** 2 for value, size in zip(sums, sizes, strict=True))
    return _t(n - 1) * math.sqrt(squares * n / (n - 1)) / total


def windows_interval(series: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Return the mean of autocorrelated values and the half-width of its 95% interval.

    `series` has the values of consecutive windows of equal length, one sequence per run. The lag-1 autocorrelation
    within the runs gives the effective sample size, as for a first-order autoregression: n (1 - r) / (1 + r). r is
    corrected for its bias in short series (M. G. Kendall, Biometrika 41, 1954) and raised by 0.7 standard errors,
    because a value that is too low makes the interval too narrow. With two runs, the interval is at least that of
    their means. None with fewer than eight values, or with an effective sample size under two per run.
    """
    runs = [np.asarray(values, np.float64) for values in series if len(values)]
    n = sum(map(len, runs))
    if n < _MIN_WINDOWS:
        return None
    means = [float(run.mean()) for run in runs]
    residuals = [run - mean for run, mean in zip(runs, means, strict=True)]
    squares = math.fsum(float(values @ values) for values in residuals)
    inflation = _autoregressive_inflation(residuals, squares) if squares else 1.0
    size = n / inflation
    if size < 2 * len(runs):
        return None
    # The mean of each run takes as many independent values as `inflation` from the degrees of freedom.
    variance = squares / max(n - len(runs) * inflation, n / 3)
    half_width = _t(max(1, int(size) - len(runs))) * math.sqrt(variance / size)
    if len(runs) == 2:
        half_width = max(half_width, _t(1) * abs(means[0] - means[1]) / 2)
    return math.fsum(float(run.sum()) for run in runs) / n, half_width


def _autoregressive_inflation(residuals: Sequence[npt.NDArray[np.float64]], squares: float) -> float:
    """Return the variance inflation factor of a mean, (1 + r) / (1 - r)."""
    n = sum(map(len, residuals))
    lag1 = math.fsum(float(values[1:] @ values[:-1]) for values in residuals) / squares
    lag1 += (1 + 4 * max(lag1, 0.0)) * len(residuals) / n
    lag1 += _RAISED_BY * math.sqrt(max(1 - lag1 * lag1, 0.02) / n)
    lag1 = min(0.98, max(0.0, lag1))
    return (1 + lag1) / (1 - lag1)


def _t(degrees: int) -> float:
    """Return the 97.5% point of Student's t."""
    return student_t.quantile((1 + CONFIDENCE) / 2, degrees)


def _binomial(n: int, q: float) -> tuple[int, npt.NDArray[np.float64]]:
    """Return the first count and the probabilities of the counts of a binomial variable around its mean.

    They cover 12 standard deviations to either side: the probability outside is below 1e-20.
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
