"""Fair sharing between keys: one key must not fill a queue that others need too."""

from __future__ import annotations

import math

# What one key holds must stay below this many times what is free ("dynamic threshold"). So one key alone gets 4/5, two
# get 4/9 each, and a key that holds nothing finds room.
SHARE = 4.0


def exceeds_share(held: float, amount: float, free: float) -> bool:
    """Return whether `amount` more is too much for a tenant that holds `held` while `free` is left.

    A tenant that holds nothing is never over its share; the limit of the queue itself applies to it.
    """
    return held > 0 and held + amount > SHARE * free


class Shares:
    """How much of a capacity, such as requests in flight, each tenant holds."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._total = capacity, 0
        self._held: dict[str, int] = {}

    @property
    def most(self) -> int:
        """The most that a tenant can hold while there is no other."""
        return math.ceil(self._capacity * SHARE / (1 + SHARE))

    def take(self, tenant: str, amount: int = 1, *, strict: bool = False) -> bool:
        """Count `amount`; return False, and count nothing, if it exceeds the share of the tenant.

        `strict`: also if the tenant holds nothing, and what is free is what remains before the last unit of `amount`.
        """
        held, free = self._held.get(tenant, 0), self._capacity - self._total
        over = held + amount > SHARE * (free - amount + 1) if strict else exceeds_share(held, amount, free)
        if over:
            return False
        self._held[tenant] = held + amount
        self._total += amount
        return True

    def release(self, tenant: str, amount: int = 1) -> None:
        """Count `amount` that was taken as free."""
        self._total -= amount
        held = self._held[tenant] = self._held.get(tenant, 0) - amount
        if not held:
            del self._held[tenant]
