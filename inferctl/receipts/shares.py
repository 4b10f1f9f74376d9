"""Shares of requests: whether a count shows that the true share is over a limit, and how to print a share.

The test is exact: the lower bound of the one-sided 97.5% interval (C. J. Clopper and E. S. Pearson, Biometrika 26,
1934). It takes requests as independent.
"""

from __future__ import annotations

import math
from decimal import Decimal

_ALPHA = 0.025
# With more than this share of requests without a good response, the p99 of all requests has no upper bound.
P99_SHARE = 0.01


def exceeds(count: int, total: int, limit: float) -> bool:
    """Return whether `count` of `total` requests show that the true share is over `limit` (0 to 1).

    A count over `limit * total` alone shows nothing: one failure among 400 requests is likely if 0.05% fail.
    """
    return count > 0 and _upper_tail(count, total, limit) < _ALPHA


def percent(count: float, total: float) -> str:
    """Return the share as a percentage with two significant digits, such as `0.24%` or `100%`."""
    return f"{Decimal(f'{100 * count / max(1, total):.2g}'):f}%"


def _upper_tail(count: int, total: int, share: float) -> float:
    """Return the probability of `count` or more among `total` requests; 1 if `count` is no more than the mean."""
    if share >= 1 or count <= share * total:
        return 1.0
    if share <= 0:
        return 0.0
    logarithm = math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1)
    term = math.exp(logarithm + count * math.log(share) + (total - count) * math.log1p(-share))
    tail = 0.0
    for number in range(count, total + 1):
        tail += term
        # Above the mean, each term is smaller than the one before.
        term *= (total - number) / (number + 1) * share / (1 - share)
        if term < 1e-12 * tail:
            break
    return tail
