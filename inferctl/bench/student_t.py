"""Quantiles of Student's t distribution. Standard library only, so that `inferctl compare` starts fast in CI."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=4096)
def quantile(p: float, degrees: int) -> float:
    """Return the p-quantile for 0.5 <= p < 1: the distribution function, inverted by bisection."""
    low, high = 0.0, 2.0
    while distribution(high, degrees) < p:
        high *= 2
    for _ in range(50):  # to 1e-14 of the first bound
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle, degrees) < p else (low, middle)
    return high


def distribution(t: float, degrees: int) -> float:
    """Return P(T <= t) for t >= 0 and whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees == 1:
        return 0.5 + angle / math.pi
    even = degrees % 2 == 0
    term = total = 1.0 if even else cosine
    for k in range(2 if even else 3, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    within = sine * total if even else 2 / math.pi * (angle + sine * total)
    return 0.5 + within / 2
