"""Compare the clocks of two machines by messages: CLOCK_MONOTONIC of each machine starts at an arbitrary time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


def machine() -> str:
    """Return a text that is equal for processes with the same CLOCK_MONOTONIC.

    Such processes share the boot of the machine and the time namespace.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # os.readlink and not Path.readlink: the text of the link identifies the namespace; it is not a path.
        return f"{boot} {os.readlink('/proc/self/ns/time')}"  # noqa: PTH115
    except OSError:
        # Without these files, only processes with the same parent are known to share the clock.
        return f"{os.uname().nodename} {os.getppid()}"


@dataclass(frozen=True)
class Offset:
    """Difference of another machine's clock to the local one. The true value is within `uncertainty_ns` of `ns`."""

    ns: int = 0
    uncertainty_ns: int = 0


def offset(trips: Iterable[tuple[int, int, int]]) -> Offset:
    """Return the offset from round trips: (local send time, remote time, local receive time), in nanoseconds.

    The remote time was read between the two local times, so the shortest trip gives the smallest uncertainty.
    """
    sent, remote, received = min(trips, key=lambda trip: trip[2] - trip[0])
    return Offset(remote - (sent + received) // 2, (received - sent + 1) // 2)
