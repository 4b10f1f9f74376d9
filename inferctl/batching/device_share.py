"""Whose batch runs next on a device that several models share. It has no clock: the time is an argument.

Each model has a virtual time: the seconds of the device that its batches took, divided by its weight. The model with
the earliest one sends the next batch ("start-time fair queueing"). A model that had no requests for a while continues
at the time of the others, so it gets nothing later for what it did not use. One model alone gets the whole device.

The device runs at most as many batches as one model could have in flight there: what fills it, and a prefetched one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

# The use of the device by a model is a mean of about this many seconds.
_MEAN_S = 2.0
_ROUNDING = 1e-9


class Load(NamedTuple):
    """Which part of a device batches use, and which part those will use that an engine has prefetched.

    `remaining_s`: predicted seconds of the device until all of them are done. `overdue_s`: seconds until one of them
    has taken so long that it does not count any more; infinity without one.
    """

    running: float = 0.0
    prefetched: float = 0.0
    remaining_s: float = 0.0
    overdue_s: float = math.inf

    @classmethod
    def total(cls, loads: Sequence[Load], parts: int = 1) -> Load:
        """Return the sum. Each of the loads is of one of `parts` equal parts of the device."""
        running, prefetched, remaining_s, overdue_s = zip(Load(), *loads, strict=True)
        return cls(sum(running) / parts, sum(prefetched) / parts, sum(remaining_s) / parts, min(overdue_s))

    def accepted(self, part: float) -> int:
        """Return how many batches can start of which each uses `part` of the device. The last one may exceed it."""
        return max(0, math.ceil((1 - self.running) / part - _ROUNDING))

    @property
    def accepts_prefetch(self) -> bool:
        """Whether one more batch can be sent that waits for these."""
        return self.running + self.prefetched < 1 + _ROUNDING


class SharingModel(Protocol):
    """What the share of a device needs to know of a model. `place`: which of several equal devices; the first is 0."""

    def waits(self) -> bool:
        """Return whether something is queued that an engine of the model accepts, perhaps as a prefetched batch."""

    def send(self, *, prefetch: bool) -> bool:
        """Send one batch if an engine and the device accept it, and return whether one was sent."""

    def load(self, place: int, moment: float) -> Load:
        """Return the load of its batches. `moment`: the device's own time."""

    def queued_s(self) -> float:
        """Return the predicted seconds of the device that its queue needs."""


@dataclass
class Turn:
    """The share of one model."""

    device: DeviceShare
    model: SharingModel
    weight: float
    virtual: float
    _used: float = field(default=0.0, init=False)  # seconds, of which earlier ones count less
    _used_at: float = field(default=0.0, init=False)

    def charge(self, seconds: float, now: float) -> None:
        """Count seconds of the device: those predicted when a batch is sent, and at its end what that was wrong by."""
        self.device.changed()
        self._used, self._used_at = self.use(now) * _MEAN_S + seconds, now
        self.virtual += seconds / self.weight

    def use(self, now: float) -> float:
        """Return which part of the device the model used lately."""
        return max(0.0, self._used) / _MEAN_S * math.exp((self._used_at - now) / _MEAN_S)

    def elapsed(self, seconds: float, now: float) -> float:
        """Return the predicted seconds until the model got `seconds` of the device.

        Another model takes from it what is queued and what will arrive, as before, but not more than its weight allows.
        """
        others = [
            (turn.model.queued_s(), turn.use(now), seconds * turn.weight / self.weight)
            for turn in self.device.turns
            if turn is not self
        ]
        found = seconds + sum(most for *_, most in others)
        for _ in range(3):  # it converges from above
            found = seconds + sum(min(most, queued + use * found) for queued, use, most in others)
        return found


class DeviceShare:
    """The models that share one device, or several equal ones."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self._virtual = 0.0  # of the model that sent the last batch, before it
        self._clocks: dict[int, tuple[float, float]] = {}  # of each place: the time, its own time
        self._loads: dict[int, tuple[float, Load]] = {}  # of each place: when its load was computed

    def join(self, model: SharingModel, weight: float) -> Turn:
        """Add a model."""
        self.turns.append(Turn(self, model, weight, self._virtual))
        return self.turns[-1]

    def changed(self) -> None:
        """Note that a batch or an engine starts or ends."""
        self._loads.clear()

    def load(self, place: int, now: float) -> Load:
        """Return the load of all models."""
        at, load = self._loads.get(place, (now, Load(overdue_s=0.0)))
        if now - at >= load.overdue_s:
            moment = self.moment(place, now)
            at, load = now, Load.total([turn.model.load(place, moment) for turn in self.turns])
            self._loads[place] = at, load
        passed = now - at
        return load._replace(remaining_s=max(0.0, load.remaining_s - passed), overdue_s=load.overdue_s - passed)

    def moment(self, place: int, now: float) -> float:
        """Return the device's own time. To be called before a batch starts or ends.

        It is slower while more batches run than fill the device. So each of them takes as long as it would alone.
        """
        self.changed()
        at, moment = self._clocks.get(place, (now, now))
        running = sum(turn.model.load(place, moment).running for turn in self.turns)
        moment += (now - at) / max(1.0, running)
        self._clocks[place] = now, moment
        return moment

    def dispatch(self, now: float) -> float:
        """Let the models send what the device accepts.

        Return after how many seconds this must be called again, because a batch takes too long; else infinity.
        """
        while waiting := sorted((turn for turn in self.turns if turn.model.waits()), key=self._start):
            if not (any(self._sent(turn) for turn in waiting) or self._sent(waiting[0], prefetch=True)):
                return min((self.load(place, now).overdue_s for place in self._clocks), default=math.inf)
        return math.inf

    def _start(self, turn: Turn) -> float:
        return max(turn.virtual, self._virtual)

    def _sent(self, turn: Turn, *, prefetch: bool = False) -> bool:
        """Let a model send a batch, and return whether it did."""
        before, start = turn.virtual, self._start(turn)
        turn.virtual = start
        if not turn.model.send(prefetch=prefetch):
            turn.virtual = before
            return False
        self._virtual = start
        return True
