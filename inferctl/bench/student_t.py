"""Quantiles of Student's t distribution. Standard library only, so that `inferctl compare` starts fast in CI."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

# Above this many degrees of freedom, the next term of the expansion is below 1e-8; the exact sum takes longer.
_EXACT_UP_TO = 200


@lru_cache(maxsize=4096)
def quantile(p: float, degrees: int) -> float:
    """Return the p-quantile for 0.5 <= p < 1.

    Up to 200 degrees of freedom, the distribution function is inverted by bisection. Above, the result is the
    Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
    """
    if degrees > _EXACT_UP_TO:
        return _expansion(NormalDist().inv_cdf(p), degrees)
    low, high = 0.0, 2.0
    while distribution(high, degrees) < p:
        high *= 2
    for _ in range(80):
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


def _expansion(z: float, degrees: int) -> float:
    """Return the quantile of t whose standard normal quantile is z."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, 1))
