"""Decide from a few noisy runs of each side whether a figure became worse. docs/compare.md explains the statistics.

Pure functions, standard library only. The unit is the run, since requests in one run are not independent. The mean of
the logarithms of the figures is compared: effects are ratios, and the center is the geometric mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

from inferctl.bench import student_t

ERROR_RATE = 0.05
CONFIDENCE = 1 - ERROR_RATE
POWER = 0.8
MIN_RUNS = 3
# Fewer runs do not show enough of how runs differ.
RECOMMENDED_REPEATS = 5
MAX_REPEATS = 100

Outcome = Literal["regression", "no regression", "improvement", "not enough evidence", "not compared"]


@dataclass(frozen=True)
class Tolerance:
    """The smallest change that counts.

    `threshold` is a share (0.05 is 5%), `floor` the minimum absolute difference in the unit of the figure.
    """

    threshold: float
    floor: float = 0.0


@dataclass(frozen=True)
class Effect:
    """The change from old to new on the log scale: `estimate` of log(new/old) with its standard `error`.

    `degrees` are the degrees of freedom. `spread` is the standard deviation of one repeat, so that
    error = spread / sqrt(repeats).
    """

    estimate: float
    error: float
    degrees: int
    spread: float
    repeats: int


@dataclass(frozen=True)
class Verdict:
    """The decision on one figure.

    `change` is the share by which the figure grew (0.1: new is 10% higher), and [`low`, `high`] its interval, joint for
    all figures that are judged together. `worst_case` is the upper bound of the regression (one-sided, 95%), as a
    share. `repeats_needed` is about how many repeats per side would decide an inconclusive figure. It is None if the
    figure is decided, or if it would take over `MAX_REPEATS`. `reason` says why the figure is inconclusive.
    """

    outcome: Outcome
    change: float
    low: float
    high: float
    worst_case: float
    repeats_needed: int | None
    reason: str


def effect_on_logs(old: Sequence[float], new: Sequence[float], interleaved: bool) -> Effect:
    """Return the effect on the logarithms of values above 0.

    Over interleaved repeats it is Student's t of the log ratio of each repeat; it needs at least two pairs. Over runs
    that were measured at different times it is Welch's t; the degrees of freedom follow Satterthwaite, rounded down.
    """
    return _effect([math.log(value) for value in old], [math.log(value) for value in new], interleaved)


def _effect(old: Sequence[float], new: Sequence[float], interleaved: bool) -> Effect:
    return _paired_differences(old, new) if interleaved else _welch(old, new)


def _paired_differences(old: Sequence[float], new: Sequence[float]) -> Effect:
    differences = [after - before for before, after in zip(old, new, strict=True)]
    n = len(differences)
    spread = math.sqrt(_variance(differences))
    return Effect(math.fsum(differences) / n, spread / math.sqrt(n), n - 1, spread, n)


def _welch(old: Sequence[float], new: Sequence[float]) -> Effect:
    variances = [_variance(values) / len(values) for values in (old, new)]
    total = math.fsum(variances)
    fewest = min(len(old), len(new))
    degrees = fewest - 1
    if total > 0:
        squares = (variance**2 / (len(side) - 1) for variance, side in zip(variances, (old, new), strict=True))
        degrees = math.floor(total**2 / math.fsum(squares) + 1e-9)
    estimate = math.fsum(new) / len(new) - math.fsum(old) / len(old)
    return Effect(estimate, math.sqrt(total), max(1, degrees), math.sqrt(total * fewest), fewest)


def decide(effect: Effect, baseline: float, higher_is_worse: bool, tolerance: Tolerance, error_rate: float) -> Verdict:
    """Return the verdict on a figure whose old value is `baseline`.

    `error_rate` is that of its two-sided interval. Figures that are judged together share one (Bonferroni).

    Regression: the interval excludes "no change", and the estimate exceeds both the threshold and the floor.
    No regression: the one-sided bound is within the threshold or the floor. Otherwise there is not enough evidence.
    """
    sign = 1.0 if higher_is_worse else -1.0
    margin = _margin(baseline, higher_is_worse, tolerance)
    found = _decide(effect, sign * effect.estimate, margin, error_rate)
    return replace(
        found,
        change=math.expm1(found.change),
        low=math.expm1(found.low),
        high=math.expm1(found.high),
        worst_case=sign * math.expm1(sign * found.worst_case),
    )


def decide_difference(
    old: Sequence[float], new: Sequence[float], interleaved: bool, margin: float, error_rate: float
) -> Verdict:
    """Return the verdict on a figure that may be zero, such as a share of requests, and that is worse if it is higher.

    `change`, `low`, `high` and `worst_case` are differences in the unit of the figure, as is `margin`. Otherwise the
    rules are those of `decide`.
    """
    effect = _effect(old, new, interleaved)
    return _decide(effect, effect.estimate, margin, error_rate)


def _decide(effect: Effect, worse: float, margin: float, error_rate: float) -> Verdict:
    """Return the verdict on a change for the worse by `worse`, of which `margin` is tolerated; all on one scale."""
    half_width = effect.error * student_t.quantile(1 - error_rate / 2, effect.degrees)
    bound = worse + effect.error * student_t.quantile(CONFIDENCE, effect.degrees)
    outcome: Outcome = "not enough evidence"
    needed, reason = None, ""
    if worse - half_width > 0 and worse > margin:
        outcome = "regression"
    elif worse + half_width < 0 and -worse > margin:
        outcome = "improvement"
    elif bound <= margin:
        outcome = "no regression"
    else:
        needed = repeats_needed(worse, margin, effect.spread, error_rate, effect.repeats)
        reason = _why_inconclusive(worse, half_width, margin)
    low, high = effect.estimate - half_width, effect.estimate + half_width
    return Verdict(outcome, effect.estimate, low, high, bound, needed, reason)


def repeats_needed(worse: float, margin: float, spread: float, error_rate: float, done: int) -> int | None:
    """Return the fewest repeats, more than `done`, that decide with 80% probability; None: over `MAX_REPEATS`.

    N repeats are enough if they would show that no change is no regression, and that a change of twice the margin (or
    of the size seen, if larger) is one. If `done` repeats are enough for that, the change is close to the margin; then
    N repeats must decide a change of the size seen. All values are on the log scale; `spread` is that of one repeat.
    """

    def decides(n: int) -> bool:
        shown = _shows_regression(max(worse, 2 * margin), margin, spread, error_rate, n)
        return shown and (worse > 2 * margin or _excludes_regression(min(worse, 0.0), margin, spread, n))

    def decides_as_seen(n: int) -> bool:
        if worse > margin:
            return _shows_regression(worse, margin, spread, error_rate, n)
        return _excludes_regression(worse, margin, spread, n)

    enough = decides_as_seen if decides(done) else decides
    return next((n for n in range(done + 1, MAX_REPEATS + 1) if enough(n)), None)


def _shows_regression(worse: float, margin: float, spread: float, error_rate: float, n: int) -> bool:
    """Return whether n repeats find a true change of `worse` to be a regression with 80% probability."""
    error = spread / math.sqrt(n)
    least = max(margin, error * student_t.quantile(1 - error_rate / 2, n - 1))
    return worse - least >= NormalDist().inv_cdf(POWER) * error


def _excludes_regression(worse: float, margin: float, spread: float, n: int) -> bool:
    """Return whether n repeats show with 80% probability that a true change of `worse` is within the margin."""
    error = spread / math.sqrt(n)
    return margin - worse - error * student_t.quantile(CONFIDENCE, n - 1) >= NormalDist().inv_cdf(POWER) * error


def _margin(baseline: float, higher_is_worse: bool, tolerance: Tolerance) -> float:
    """Return the larger of threshold and floor on the log scale, in the direction of worse."""
    threshold = math.log1p(tolerance.threshold) if higher_is_worse else -math.log1p(-tolerance.threshold)
    if higher_is_worse:
        return max(threshold, math.log1p(tolerance.floor / baseline))
    return max(threshold, -math.log1p(-tolerance.floor / baseline) if tolerance.floor < baseline else math.inf)


def _why_inconclusive(worse: float, half_width: float, margin: float) -> str:
    if worse > margin:
        return "the change exceeds the tolerance, but the interval includes zero"
    if worse - half_width > 0:
        return "worse, but the change may be within the tolerance or exceed it"
    return "a change that exceeds the tolerance cannot be excluded"


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
