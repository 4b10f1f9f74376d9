"""Limits on requests and tokens per minute, for each key. Times are arguments (Unix time, s): there is no clock here.

A window counts in cells of 5 s. It adds up the current cell and the 12 before it, the oldest one whole. So in any 60 s,
at most the limit is admitted. (Two cells of 60 s, the older one weighted, would admit nearly twice the limit.)

The counters of a cell only grow: one for what was charged, one for what was given back. Servers that share a limit tell
each other their own counters. A receiver keeps the maximum, so lost, doubled and reordered messages do no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

from inferctl.access.key_file import ApiKey

CELL_S = 5.0
CELLS = 13  # 60 s, and the oldest one whole
PERIOD_S = 60
# After this long without counters of other servers, each one applies its share of the limit.
EXCHANGE_TIMEOUT_S = 3.0
# Keys that were not used for a while are forgotten when there are more than this many.
_MANY_KEYS = 10_000

Resource = Literal["requests", "tokens"]
# The limit, what remains of it, and the seconds until it is unused.
Quota = tuple[int, int, int]
# Cell -> (charged, given back), both since the start of the server.
Cells = dict[int, tuple[int, int]]
# Key id -> counters of requests, and of tokens.
Counters = dict[str, tuple[Cells, Cells]]


class LimitError(Exception):
    """A request exceeds a limit of its key. `retry_after`: seconds until it fits; None if it never does."""

    def __init__(self, resource: Resource, limit: int, used: int, amount: int, retry_after: float | None) -> None:
        self.resource, self.retry_after = resource, retry_after
        what = f"{limit} {resource} per minute"
        if retry_after is None:
            message = f"the request needs {amount} {resource}, and the limit of this key is {what}"
        else:
            message = f"the limit of this key is {what}: {used} are used, and the request needs {amount}"
            message += f"; retry after {math.ceil(retry_after)} s"
        super().__init__(message)


class Window:
    """What one key used of one resource. `cell`: the newest of the window.

    `reserved`: for requests in flight whose use is not known yet.
    """

    __slots__ = ("_foreign", "_own", "cell", "foreign_total", "newest", "own_total", "reserved")

    def __init__(self) -> None:
        self.reserved = self.own_total = self.foreign_total = 0
        self.newest = 0  # cell of the last charge
        self.cell = 0
        self._own: dict[int, list[int]] = {}
        self._foreign: dict[str, Cells] = {}

    def advance(self, cell: int) -> None:
        """Forget what is no longer in the window that ends with `cell`. Called before the totals are read.

        Cells up to a window ahead count too: the clocks of servers differ, and a clock may be set back.
        """
        if cell == self.cell:
            return
        self.cell = cell
        oldest, last = cell - CELLS + 1, cell + CELLS
        self._own = {each: counts for each, counts in self._own.items() if oldest <= each <= last}
        for replica, cells in list(self._foreign.items()):
            kept = {each: counts for each, counts in cells.items() if oldest <= each <= last}
            if kept:
                self._foreign[replica] = kept
            else:
                del self._foreign[replica]
        self.own_total = sum(charged - returned for charged, returned in self._own.values())
        self.foreign_total = sum(
            max(0, charged - returned) for cells in self._foreign.values() for charged, returned in cells.values()
        )

    def charge(self, amount: int) -> int:
        """Count `amount` in the current cell, and return the cell."""
        counts = self._own.get(self.cell)
        if counts is None:
            counts = self._own[self.cell] = [0, 0]
        counts[0] += amount
        self.own_total += amount
        self.newest = self.cell
        return self.cell

    def give_back(self, cell: int, amount: int) -> None:
        """Undo a part of what was charged in `cell`."""
        if counts := self._own.get(cell):
            amount = min(amount, counts[0] - counts[1])
            counts[1] += amount
            self.own_total -= amount

    def own(self) -> Cells:
        """Return the counters of this server."""
        return {cell: (charged, returned) for cell, (charged, returned) in self._own.items()}

    def merge(self, replica: str, cells: Mapping[int, tuple[int, int]]) -> None:
        """Take over the counters of another server. `advance` comes first."""
        known = self._foreign.setdefault(replica, {})
        for cell, (charged, returned) in cells.items():
            if not self.cell - CELLS < cell <= self.cell + CELLS:
                continue
            before = known.get(cell, (0, 0))
            after = known[cell] = (max(before[0], charged), max(before[1], returned))
            self.foreign_total += max(0, after[0] - after[1]) - max(0, before[0] - before[1])
            self.newest = max(self.newest, cell)

    def seconds_until(self, amount: int, now: float, *, shared: bool) -> float:
        """Return the seconds until `amount` less than now is counted."""
        every: dict[int, int] = {}
        sources: list[Mapping[int, tuple[int, int] | list[int]]] = [self._own]
        if shared:
            sources += self._foreign.values()
        for cells in sources:
            for cell, counts in cells.items():
                every[cell] = every.get(cell, 0) + counts[0] - counts[1]
        for cell in sorted(every):
            amount -= every[cell]
            if amount <= 0:
                return max(0.001, (cell + CELLS) * CELL_S - now)
        return CELL_S  # the rest is reserved by requests in flight


class KeyUsage:
    """The windows and the limits of one key. A limit of None does not limit."""

    __slots__ = ("_limiter", "key", "limits", "windows")

    def __init__(self, limiter: Limiter, key: ApiKey) -> None:
        self._limiter, self.windows = limiter, (Window(), Window())
        self.key = key
        self.limits: tuple[int | None, int | None] = limiter.limits_of(key)

    def check(self, index: int, amount: int, now: float) -> None:
        """Raise `LimitError` if `amount` of a resource (0: requests, 1: tokens) does not fit into its window."""
        limit, used = self._state(index, int(now // CELL_S), now < self._limiter.fresh_until)
        if limit is not None and used + amount > limit:
            resource: Resource = "tokens" if index else "requests"
            wait = None
            if amount <= limit:
                shared = now < self._limiter.fresh_until
                wait = self.windows[index].seconds_until(used + amount - limit, now, shared=shared)
            raise LimitError(resource, limit, used, amount, wait)

    def quotas(self, now: float) -> tuple[Quota | None, Quota | None]:
        """Return the state of the limits of requests and of tokens; None for no limit."""
        cell, shared = int(now // CELL_S), now < self._limiter.fresh_until
        requests, tokens = self._quota(0, cell, shared, now), self._quota(1, cell, shared, now)
        return requests, tokens

    def _quota(self, index: int, cell: int, shared: bool, now: float) -> Quota | None:
        limit, used = self._state(index, cell, shared)
        if limit is None:
            return None
        window = self.windows[index]
        empty = not (window.own_total or window.foreign_total)
        seconds = 0 if empty else math.ceil((window.newest + CELLS) * CELL_S - now)
        return limit, limit - used if used < limit else 0, seconds

    def used(self, now: float) -> bool:
        """Return whether anything counts."""
        for window in self.windows:
            window.advance(int(now // CELL_S))
        return any(window.own_total or window.foreign_total or window.reserved for window in self.windows)

    def _state(self, index: int, cell: int, shared: bool) -> tuple[int | None, int]:
        """Return the limit that this server applies now, and what counts towards it."""
        limit, window = self.limits[index], self.windows[index]
        if window.cell != cell:
            window.advance(cell)
        used = window.own_total + window.reserved
        if shared:
            used += window.foreign_total
        elif limit is not None and self._limiter.replicas > 1:
            limit = max(1, limit // self._limiter.replicas)
        return limit, used


class Charge:
    """What one request was charged. The edge closes it at the end of the request."""

    __slots__ = ("_request_cell", "_reserved", "_token_cell", "_tokens", "_usage")

    def __init__(self, usage: KeyUsage, now: float) -> None:
        """Charge one request. Raises `LimitError`."""
        self._usage = usage
        self._tokens = self._reserved = self._token_cell = 0
        usage.check(0, 1, now)
        self._request_cell = usage.windows[0].charge(1)

    def tokens(self, amount: int, now: float) -> None:
        """Charge tokens before they are computed. Raises `LimitError`."""
        self._usage.check(1, amount, now)
        self._token_cell, self._tokens = self._usage.windows[1].charge(amount), amount

    def reserve(self, amount: int, now: float) -> None:
        """Keep tokens for a request whose use is known at its end only. Raises `LimitError`."""
        self._usage.check(1, amount, now)
        self._usage.windows[1].reserved += amount
        self._reserved += amount

    def settle(self, amount: int, now: float) -> None:
        """Charge the tokens that were used, in place of the reserved ones."""
        self._release()
        window = self._usage.windows[1]
        window.advance(int(now // CELL_S))
        window.charge(amount)

    def close(self, *, give_back: bool) -> None:
        """End the request. `give_back`: it was not computed, so it costs nothing."""
        if self._reserved:
            self._release()
        if give_back:
            requests, tokens = self._usage.windows
            requests.give_back(self._request_cell, 1)
            tokens.give_back(self._token_cell, self._tokens)

    def _release(self) -> None:
        self._usage.windows[1].reserved -= self._reserved
        self._reserved = 0


class Limiter:
    """The use of all keys on this server. `requests` and `tokens` per minute: of keys without a limit of their own.

    `replicas`: by how many servers each limit is divided while no counters of other servers arrive.
    """

    def __init__(self, requests: int | None = None, tokens: int | None = None, replicas: int = 1) -> None:
        self._requests, self._tokens, self.replicas = requests, tokens, replicas
        self._usages: dict[str, KeyUsage] = {}
        self._many = _MANY_KEYS
        self.fresh_until = -math.inf  # until when the counters of the other servers are known

    def limits_of(self, key: ApiKey) -> tuple[int | None, int | None]:
        """Return the limits of a key, per minute: requests and tokens."""
        return key.requests_per_minute or self._requests, key.tokens_per_minute or self._tokens

    def usage(self, key: ApiKey, now: float) -> KeyUsage | None:
        """Return the use of a key, to which requests are charged; None if the key has no limits."""
        usage = self._usages.get(key.id)
        if usage is None or usage.key is not key:  # the key file was read again
            limits = self.limits_of(key)
            if limits == (None, None):
                return None
            usage = self._new_usage(key, now) if usage is None else usage
            usage.key, usage.limits = key, limits
        return usage

    def counters(self, now: float) -> Counters:
        """Return the counters of this server, for the others."""
        cell, found = int(now // CELL_S), {}
        for key_id, usage in self._usages.items():
            for window in usage.windows:
                window.advance(cell)
            requests, tokens = (window.own() for window in usage.windows)
            if requests or tokens:
                found[key_id] = (requests, tokens)
        return found

    def merge(self, replica: str, counters: Counters, now: float, find: Callable[[str], ApiKey | None]) -> None:
        """Take over the counters of the server `replica` (its name and its start). `find`: id -> key.

        From now on, limits count the use on all servers, until no counters arrive for `EXCHANGE_TIMEOUT_S`.
        """
        self.fresh_until = now + EXCHANGE_TIMEOUT_S
        cell = int(now // CELL_S)
        for key_id, cells in counters.items():
            usage = self._usages.get(key_id)
            if usage is None:
                if (key := find(key_id)) is None:
                    continue
                usage = self._new_usage(key, now)
            for window, counts in zip(usage.windows, cells, strict=True):
                window.advance(cell)
                window.merge(replica, counts)

    def _new_usage(self, key: ApiKey, now: float) -> KeyUsage:
        if len(self._usages) >= self._many:
            self._usages = {each: usage for each, usage in self._usages.items() if usage.used(now)}
            self._many = max(_MANY_KEYS, 2 * len(self._usages))
        found = self._usages[key.id] = KeyUsage(self, key)
        return found
