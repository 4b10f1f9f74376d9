"""Whose batch runs next on a device that several models share. It has no clock: the time is an argument.

Each model has a virtual time: the seconds of the device that its batches took, divided by its weight. The model with
the earliest one sends the next batch ("start-time fair queueing"). A model that had no requests for a while continues
at the time of the others, so it gets nothing later for what it did not use. One model alone gets the whole device.

The device runs as many batches as fill it. The next model may have another one prefetched, if its own fill the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

_ROUNDING = 1e-9


class Load(NamedTuple):
    """Which part of a device batches use, and the predicted seconds of the device until all of them are done.

    `overdue_s`: seconds until one of them has taken so long that it does not count any more; infinity without one.
    """

    running: float = 0.0
    remaining_s: float = 0.0
    overdue_s: float = math.inf

    def accepted(self, slots: int) -> int:
        """Return how many batches can start of which `slots` fill the device. The last one may exceed it."""
        return max(0, math.ceil((1 - self.running) * slots - _ROUNDING))


class SharingModel(Protocol):
    """What the share of a device needs to know of a model. `place`: which of several equal devices, from 0."""

    def waits(self) -> bool:
        """Return whether something is queued that an engine of the model accepts, perhaps as a prefetched batch."""

    def send(self, *, prefetch: bool) -> bool:
        """Send one batch if an engine and the device accept it, and return whether one was sent."""

    def load(self, place: int) -> Load:
        """Return the load of its batches."""

    def queued(self) -> bool:
        """Return whether something is queued."""


@dataclass
class Turn:
    """The share of one model."""

    device: DeviceShare
    model: SharingModel
    weight: float
    virtual: float = 0.0

    def charge(self, seconds: float) -> None:
        """Count seconds of the device: those predicted when a batch is sent, and at its end what that was wrong by."""
        self.virtual += seconds / self.weight

    def elapsed(self, seconds: float) -> float:
        """Return the predicted seconds until the model got `seconds` of the device.

        A model with a queue takes as much from it as its weight allows: more will arrive. To count only what is queued
        would hold no SLO of a flooded model.
        """
        others = sum(turn.weight for turn in self.device.turns if turn is not self and turn.model.queued())
        return seconds * (1 + others / self.weight)


class DeviceShare:
    """The models that share one device, or several equal ones. `loads`: of each place, since the last `dispatch`."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.loads: dict[int, Load] = {}
        self._virtual, self._at = 0.0, 0.0  # of the model that sent the last batch, before it; when it was sent

    def remaining_s(self, place: int, now: float) -> float:
        """Return the predicted seconds until the batches in flight are done."""
        return max(0.0, self.loads[place].remaining_s - (now - self._at))

    def dispatch(self, now: float) -> float:
        """Let the models send what the device accepts.

        Return after how many seconds this must be called again, because a batch takes too long; else infinity.
        """
        while True:
            self._at = now
            for place in self.loads:
                running, remaining_s, overdue_s = zip(*(turn.model.load(place) for turn in self.turns), strict=True)
                self.loads[place] = Load(sum(running), sum(remaining_s), min(overdue_s))
            waiting = [turn for turn in self.turns if turn.model.waits()]
            if not waiting:
                return math.inf
            waiting.sort(key=lambda turn: max(turn.virtual, self._virtual))
            if not (any(self._sent(turn) for turn in waiting) or self._sent(waiting[0], prefetch=True)):
                return min(load.overdue_s for load in self.loads.values())

    def _sent(self, turn: Turn, *, prefetch: bool = False) -> bool:
        """Let a model send a batch, and return whether it did."""
        start = turn.virtual = max(turn.virtual, self._virtual)
        if sent := turn.model.send(prefetch=prefetch):
            self._virtual = start
        return sent
