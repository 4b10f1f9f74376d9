"""Fair sharing between keys: one key must not fill a queue that others need too."""

from __future__ import annotations

from collections import Counter

# What one key holds must stay below this many times what is free ("dynamic threshold"). So one key alone gets 4/5, two
# get 4/9 each, and a key that holds nothing finds room.
SHARE = 4.0


def exceeds_share(held: float, amount: float, free: float) -> bool:
    """Return whether `amount` more is too much for a key that holds `held` while `free` is left.

    A key that holds nothing is never over its share; the limit of the queue itself applies to it.
    """
    return held > 0 and held + amount > SHARE * free


class InFlight:
    """The requests in flight of each key. `capacity`: of all keys."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._held, self._total = capacity, Counter[str](), 0

    def enter(self, tenant: str) -> bool:
        """Count a request; return False, and count nothing, if it exceeds the share of its key."""
        if exceeds_share(self._held[tenant], 1, self._capacity - self._total):
            return False
        self._held[tenant] += 1
        self._total += 1
        return True

    def leave(self, tenant: str) -> None:
        """Count the end of a request."""
        self._total -= 1
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
