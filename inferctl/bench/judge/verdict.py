"""Whether a figure became worse, out of a few noisy runs of each side. Pure functions, standard library only; docs/compare.md says why so.

The unit is the run, not the request: requests of one run share its luck. What is averaged is the logarithm of a run's figure, so that
effects are ratios and the geometric mean is the centre.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

CONFIDENCE = 0.95
POWER = 0.8
FEWEST_RUNS = 3
MOST_REPEATS = 100

Outcome = Literal["regression", "no regression", "improvement", "not enough evidence", "not compared"]


@dataclass(frozen=True)
class Limits:
    """From when on a change matters: `threshold` as a share (0.05 is 5 %), and `floor` in the figure's own unit."""

    threshold: float
    floor: float = 0.0


@dataclass(frozen=True)
class Effect:
    """Change from old to new: `estimate` and `error` (standard error) of the logarithm of new/old, with `degrees` of freedom.

    `spread` is the standard deviation that one more repeat brings: error = spread / sqrt(repeats).
    """

    estimate: float
    error: float
    degrees: int
    spread: float
    repeats: int
    paired: bool


@dataclass(frozen=True)
class Verdict:
    """`change`, `low`, `high` and `at_most` are shares by which the figure grew (0.1: new is 10 % higher); `low` and `high` are the interval
    that holds for all figures of the comparison together, `at_most` the one-sided bound on how much worse it became (a share of worsening).

    `repeats_needed`: about how many repeats of each side would settle it; None when it is settled, or over `MOST_REPEATS`.
    """

    outcome: Outcome
    change: float
    low: float
    high: float
    at_most: float
    repeats_needed: int | None
    reason: str


def paired(old: Sequence[float], new: Sequence[float]) -> Effect:
    """Effect over repeats that were measured side by side: Student's t of the per-repeat log ratios. Needs two pairs at least, all above 0."""
    return _paired_differences([math.log(value) for value in old], [math.log(value) for value in new])


def unpaired(old: Sequence[float], new: Sequence[float]) -> Effect:
    """Effect over runs that were not measured side by side: Welch's t of the logs, degrees of freedom by Satterthwaite, rounded down."""
    return _welch([math.log(value) for value in old], [math.log(value) for value in new])


def _paired_differences(old: Sequence[float], new: Sequence[float]) -> Effect:
    differences = [after - before for before, after in zip(old, new, strict=True)]
    n = len(differences)
    spread = math.sqrt(_variance(differences))
    return Effect(math.fsum(differences) / n, spread / math.sqrt(n), n - 1, spread, n, True)


def _welch(before: Sequence[float], after: Sequence[float]) -> Effect:
    parts = [_variance(before) / len(before), _variance(after) / len(after)]
    total = math.fsum(parts)
    least = min(len(before), len(after))
    degrees = least - 1
    if total > 0:
        degrees = math.floor(
            total**2 / math.fsum(v**2 / (len(s) - 1) for v, s in zip(parts, (before, after), strict=True)) + 1e-9
        )
    estimate = math.fsum(after) / len(after) - math.fsum(before) / len(before)
    return Effect(estimate, math.sqrt(total), max(1, degrees), math.sqrt(total * least), least, False)


def decide(effect: Effect, base: float, higher_is_worse: bool, limits: Limits, family: int) -> Verdict:
    """The verdict on a figure whose old value is `base`, one of `family` figures that are judged together.

    A regression: the joint interval excludes no change, and the estimate exceeds both the threshold and the floor. No regression: the one-sided
    bound stays within the threshold or the floor. Otherwise there is not enough evidence.
    """
    sign = 1.0 if higher_is_worse else -1.0
    worse, margin = sign * effect.estimate, _margin(base, higher_is_worse, limits)
    outcome, joint, bound, needed, reason = _settle(effect, worse, margin, family)
    return Verdict(
        outcome,
        change=math.expm1(effect.estimate),
        low=math.expm1(effect.estimate - joint),
        high=math.expm1(effect.estimate + joint),
        at_most=math.expm1(bound) if higher_is_worse else -math.expm1(-bound),
        repeats_needed=needed,
        reason=reason,
    )


def decide_difference(
    old: Sequence[float], new: Sequence[float], together: bool, margin: float, family: int
) -> Verdict:
    """Return the verdict on a figure that may be zero, such as a share of requests, and that is worse if it is higher.

    `change`, `low`, `high` and `at_most` are differences in the unit of the figure, as is `margin`. Otherwise `decide`.
    """
    effect = _paired_differences(old, new) if together else _welch(old, new)
    outcome, joint, bound, needed, reason = _settle(effect, effect.estimate, margin, family)
    estimate = effect.estimate
    return Verdict(outcome, estimate, estimate - joint, estimate + joint, bound, needed, reason)


def _settle(effect: Effect, worse: float, margin: float, family: int) -> tuple[Outcome, float, float, int | None, str]:
    """Return (outcome, half-width of the joint interval, bound on how much worse, repeats needed, reason)."""
    joint = effect.error * quantile(1 - (1 - CONFIDENCE) / (2 * family), effect.degrees)
    bound = worse + effect.error * quantile(CONFIDENCE, effect.degrees)
    if worse - joint > 0 and worse > margin:
        return "regression", joint, bound, None, ""
    if worse + joint < 0 and -worse > margin:
        return "improvement", joint, bound, None, ""
    if bound <= margin:
        return "no regression", joint, bound, None, ""
    needed = repeats_needed(worse, margin, effect.spread, family, effect.repeats)
    return "not enough evidence", joint, bound, needed, _why(worse, joint, margin)


def repeats_needed(worse: float, margin: float, spread: float, family: int, done: int) -> int | None:
    """Fewest repeats, more than `done`, that settle the verdict with 80 % probability at the spread seen; None: over `MOST_REPEATS`.

    Settled means: no change at all would be shown to be none, and one of twice the margin (or as large as seen) to be a regression. Where `done`
    repeats do that already, the change is near the margin; then it is taken to be what it was seen to be. All on the log scale.
    """

    def settles(n: int) -> bool:
        found = _finds(max(worse, 2 * margin), margin, spread, family, n)
        return found and (worse > 2 * margin or _clears(min(worse, 0.0), margin, spread, n))

    def as_seen(n: int) -> bool:
        return _finds(worse, margin, spread, family, n) if worse > margin else _clears(worse, margin, spread, n)

    enough = as_seen if settles(done) else settles
    return next((n for n in range(done + 1, MOST_REPEATS + 1) if enough(n)), None)


def _finds(worse: float, margin: float, spread: float, family: int, n: int) -> bool:
    """Whether n repeats call a true change of `worse` a regression with 80 % probability: the estimate, normal around it, exceeds both limits."""
    error = spread / math.sqrt(n)
    edge = max(margin, error * quantile(1 - (1 - CONFIDENCE) / (2 * family), n - 1))
    return worse - edge >= NormalDist().inv_cdf(POWER) * error


def _clears(worse: float, margin: float, spread: float, n: int) -> bool:
    """Whether n repeats show with 80 % probability that a true change of `worse` is within the margin."""
    error = spread / math.sqrt(n)
    return margin - worse - error * quantile(CONFIDENCE, n - 1) >= NormalDist().inv_cdf(POWER) * error


@lru_cache(maxsize=4096)
def quantile(p: float, degrees: int) -> float:
    """The p-quantile of Student's t, 0.5 <= p < 1, by bisection of its distribution function."""
    low, high = 0.0, 2.0
    while distribution(high, degrees) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle, degrees) < p else (low, middle)
    return high


def distribution(t: float, degrees: int) -> float:
    """P(T <= t) of Student's t for t >= 0 and whole degrees of freedom: the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees == 1:
        return 0.5 + angle / math.pi
    term, total = (1.0, 1.0) if degrees % 2 == 0 else (cosine, cosine)
    for k in range(2 if degrees % 2 == 0 else 3, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = sine * total if degrees % 2 == 0 else 2 / math.pi * (angle + sine * total)
    return 0.5 + inside / 2


def _margin(base: float, higher_is_worse: bool, limits: Limits) -> float:
    """The larger of threshold and floor, on the log scale, in the direction of worse."""
    threshold = math.log1p(limits.threshold) if higher_is_worse else -math.log1p(-limits.threshold)
    if higher_is_worse:
        return max(threshold, math.log1p(limits.floor / base))
    return max(threshold, -math.log1p(-limits.floor / base) if limits.floor < base else math.inf)


def _why(worse: float, joint: float, margin: float) -> str:
    if worse > margin:
        return "over the limit, but no change lies within the interval"
    if worse - joint > 0:
        return "worse, but not shown to be within the limit or over it"
    return "a change over the limit cannot be ruled out"


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
