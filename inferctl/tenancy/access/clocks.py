"""The clocks of other servers, as their messages show them.

Servers that share limits count in cells of their own clocks. Without a correction, a server whose clock is ahead would
use up the limit of the others for too long, or, more than a window ahead, count nothing there.

How much a clock is ahead is at least what a message says that arrives. How much one is behind cannot be told from one
late message, but from all messages of some seconds.
"""

from __future__ import annotations

import math

from inferctl.tenancy.access.limits import EXCHANGE_TIMEOUT_S, Counters
from inferctl.tenancy.access.window import CELL_S, Cells

# Clocks that differ by no more than this are the same.
TOLERANCE_S = 1.0
_WINDOW_S = 5.0
_MOST = 20_000  # other servers; a hostile one could send any number of names


class Clocks:
    """The clocks of all other servers."""

    def __init__(self) -> None:
        # Server -> (how much it is ahead, the most in the current window, the start of this window, the last message)
        self._found: dict[str, tuple[float, float, float, float]] = {}

    def ahead(self, server: str, clock: float, now: float) -> float:
        """Return how many seconds a server is ahead; negative if it is behind. `clock`: its time in a new message."""
        found = clock - now
        if server not in self._found and len(self._found) >= _MOST:
            self._found.clear()
        ahead, most, since, _ = self._found.get(server, (max(0.0, found), found, now, now))
        ahead, most = max(ahead, found), max(most, found)
        if not 0 <= now - since < _WINDOW_S:
            ahead, most, since = most, found, now
        self._found[server] = ahead, most, since, now
        return ahead

    def sends(self, server: str, now: float) -> bool:
        """Return whether a message of this server itself arrived within 3 s."""
        return server in self._found and 0 <= now - self._found[server][3] < EXCHANGE_TIMEOUT_S


def in_own_time(counters: Counters, ahead: float) -> Counters:
    """Return counters of a clock that is `ahead` in the cells of this clock.

    Rounded so that they count for too long, not too short. A clock that is up to 3 s behind may be one of a server
    whose messages are late.
    """
    shift = 0 if -EXCHANGE_TIMEOUT_S < ahead < 0 else math.floor((ahead + TOLERANCE_S) / CELL_S)
    if not shift:
        return counters
    return {
        key_id: (_earlier(requests, shift), _earlier(tokens, shift)) for key_id, (requests, tokens) in counters.items()
    }


def _earlier(cells: Cells, shift: int) -> Cells:
    return {cell - shift: counts for cell, counts in cells.items()}
