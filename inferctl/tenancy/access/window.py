"""The counters of one key and one resource in a window of 60 s, of this server and of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CELL_S = 5.0
CELLS = 13  # 60 s, and the oldest one whole
# The resolution of what was charged since another server was heard.
SLOT_S = 0.25
_SLOTS = int(CELL_S / SLOT_S)

# Cell -> (charged, given back), both since the start of the server.
Cells = dict[int, tuple[int, int]]
# Slots, and how many of the other servers were last heard then.
LastHeard = Sequence[tuple[int, int]]


class Window:
    """What one key used of one resource. `cell`: the newest of the window.

    `reserved`: for requests in flight whose use is not known yet.
    """

    __slots__ = ("_own", "_recent", "cell", "foreign", "foreign_total", "newest", "own_total", "reserved")

    def __init__(self) -> None:
        self.reserved = self.own_total = self.foreign_total = 0
        self.newest = 0  # cell of the last charge
        self.cell = 0
        self._own: dict[int, list[int]] = {}
        self._recent: dict[int, int] = {}  # slot -> what was charged and not given back, of the last two cells
        self.foreign: dict[str, Cells] = {}

    def advance(self, cell: int) -> None:
        """Forget what is no longer in the window that ends with `cell`. Called before the totals are read.

        Cells up to a window ahead count too: the clocks of servers differ, and a clock may be set back.
        """
        if cell == self.cell:
            return
        self.cell = cell
        oldest, last = cell - CELLS + 1, cell + CELLS
        self._own = {each: counts for each, counts in self._own.items() if oldest <= each <= last}
        self._recent = {slot: amount for slot, amount in self._recent.items() if slot >= (cell - 1) * _SLOTS}
        for replica, cells in list(self.foreign.items()):
            kept = {each: counts for each, counts in cells.items() if oldest <= each <= last}
            if kept:
                self.foreign[replica] = kept
            else:
                del self.foreign[replica]
        self.own_total = sum(charged - returned for charged, returned in self._own.values())
        self.foreign_total = sum(
            max(0, charged - returned) for cells in self.foreign.values() for charged, returned in cells.values()
        )

    def charge(self, amount: int, now: float) -> int:
        """Count `amount` in the current cell, which `advance` set, and return the slot."""
        counts = self._own.get(self.cell)
        if counts is None:
            counts = self._own[self.cell] = [0, 0]
        counts[0] += amount
        self.own_total += amount
        self.newest = self.cell
        slot = int(now // SLOT_S)
        self._recent[slot] = self._recent.get(slot, 0) + amount
        return slot

    def give_back(self, slot: int, amount: int) -> None:
        """Undo a part of what was charged in `slot`."""
        if counts := self._own.get(slot // _SLOTS):
            amount = min(amount, counts[0] - counts[1])
            counts[1] += amount
            self.own_total -= amount
            if slot in self._recent:
                self._recent[slot] -= amount

    def charged_after(self, slot: int) -> int:
        """Return what this server charged after `slot`; if that is more than two cells ago, in whole cells."""
        if slot >= (self.cell - 1) * _SLOTS:
            return sum(amount for each, amount in self._recent.items() if each > slot)
        cell = slot // _SLOTS
        return sum(charged - returned for each, (charged, returned) in self._own.items() if each >= cell)

    def own(self, oldest: int = 0) -> Cells:
        """Return the counters of this server, from the cell `oldest` on."""
        return {cell: (charged, returned) for cell, (charged, returned) in self._own.items() if cell >= oldest}

    def merge(self, replica: str, cells: Mapping[int, tuple[int, int]]) -> None:
        """Take over the counters of another server. `advance` comes first."""
        if not cells:
            return
        known = self.foreign.setdefault(replica, {})
        for cell, (charged, returned) in cells.items():
            if not self.cell - CELLS < cell <= self.cell + CELLS:
                continue
            before = known.get(cell, (0, 0))
            if charged <= before[0] and returned <= before[1]:
                continue
            after = known[cell] = (max(before[0], charged), max(before[1], returned))
            self.foreign_total += max(0, after[0] - after[1]) - max(0, before[0] - before[1])
            self.newest = max(self.newest, cell)

    def seconds_until(self, amount: int, now: float, last_heard: LastHeard = ()) -> float:
        """Return the seconds until `amount` less than now is counted. `last_heard`: as of `Limiter`."""
        every: dict[int, int] = {}
        for cell, (charged, returned) in self._own.items():
            weight = 1 + sum(count for slot, count in last_heard if cell >= slot // _SLOTS)
            every[cell] = (charged - returned) * weight
        for cells in self.foreign.values():
            for cell, (charged, returned) in cells.items():
                every[cell] = every.get(cell, 0) + charged - returned
        for cell in sorted(every):
            amount -= every[cell]
            if amount <= 0:
                return max(0.001, (cell + CELLS) * CELL_S - now)
        return CELL_S  # the rest is reserved by requests in flight
