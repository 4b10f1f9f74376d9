"""CLOCK_MONOTONIC starts anywhere: two machines' clocks are compared by messages, and what remains unknown is said."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


def machine() -> str:
    """Equal for processes that share CLOCK_MONOTONIC: the same boot of a machine, and the same time namespace in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Not Path.readlink: it is the link's text that counts.
        return f"{boot} {os.readlink('/proc/self/ns/time')}"  # noqa: PTH115
    except OSError:
        # Without an answer nothing is known to be shared but with one's own children.
        return f"{os.uname().nodename} {os.getppid()}"


@dataclass(frozen=True)
class Offset:
    """`ns` to add to our clock for theirs; the true value is within `uncertainty_ns` of it."""

    ns: int = 0
    uncertainty_ns: int = 0


def offset(trips: Iterable[tuple[int, int, int]]) -> Offset:
    """From round trips (sent by us, read by them, answered to us): theirs was read somewhere in between, so the shortest trip says most."""
    sent, theirs, back = min(trips, key=lambda trip: trip[2] - trip[0])
    return Offset(theirs - (sent + back) // 2, (back - sent + 1) // 2)
