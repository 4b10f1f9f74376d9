"""Limits on requests and tokens per minute, for each key. Times are arguments (Unix time, s): there is no clock here.

A window counts in cells of 5 s. It adds up the current cell and the 12 before it, the oldest one whole. So in any 60 s,
at most the limit is admitted. (Two cells of 60 s, the older one weighted, would admit nearly twice the limit.)

The counters of a cell only grow: one for what was charged, one for what was given back. Servers that share a limit tell
each other their own counters. A receiver keeps the maximum, so lost, doubled and reordered messages do no harm.

What this server charged since it last heard from another one counts once more for that one: it may have charged as much
in this time, and neither knows of the other. So there is no burst in which each server admits the whole limit. If
counters stop to arrive, all that this server charges counts once for each server, which leaves it limit / replicas.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Literal

from inferctl.tenancy.access.window import CELL_S, CELLS, SLOT_S, Cells, LastHeard, Window

PERIOD_S = 60
# After this long without counters of a server, the others show and explain limit / replicas as their limit.
EXCHANGE_TIMEOUT_S = 3.0
# What this server charged is known to the others after this time at most.
DELAY_S = 0.5
# Until the other servers know what this one charged just now.
_SETTLED_S = 1.0
# An estimate, for requests that are not tokenized.
BYTES_PER_TOKEN = 4
# A request counts at least one token for so many bytes of its body, which must be read and parsed. Texts have about 5
# bytes for each token; a text of 512 tokens may have 128 KiB, of which the rest is truncated.
MOST_BYTES_PER_TOKEN = 256
# Keys that were not used for a while are forgotten when there are more than this many.
_MANY_KEYS = 10_000
# `next_counters` returns all keys in this many calls: when all other servers are heard, which know them, and when not.
# One call of `next_counters` or `changes` returns at most so many keys, which takes 2 ms.
_CALLS_KNOWN, _CALLS, _MANY_AT_ONCE = 100, 20, 500
# The clock was set back if it is so much behind what it was.
_SET_BACK_S = 1.0
# Keys of other servers that are kept. A hostile server could send any number.
_MOST_KEYS = 100_000

Resource = Literal["requests", "tokens"]
# The limit, what remains of it, and the seconds until it is unused; of the limits of requests and of tokens.
Quota = tuple[int, int, int]
Quotas = tuple[Quota | None, Quota | None]
# Of requests and of tokens, per minute; None for no limit.
Limits = tuple[int | None, int | None]
NO_LIMITS: Limits = (None, None)
# Key id -> counters of requests, and of tokens.
Counters = dict[str, tuple[Cells, Cells]]


class LimitError(Exception):
    """A request exceeds a limit of its key. `retry_after`: seconds until it fits; None if it never does.

    `size`: the bytes of the body from which `amount` is estimated, because the request was not tokenized; 0 if it was.
    """

    def __init__(
        self, resource: Resource, limit: int, used: int, amount: int, retry_after: float | None, *, size: int = 0
    ) -> None:
        self.resource, self.retry_after = resource, retry_after
        what = f"{limit} {resource} per minute"
        needed = f"about {amount} {resource} for its {size} bytes" if size else f"{amount} {resource}"
        if retry_after is None:
            message = f"the request needs {needed}, and the limit of this key is {what}"
        elif used + amount <= limit and not size:
            message = f"the limit of this key is {what}, and this server used its share of what remains"
        else:
            message = f"the limit of this key is {what}: {used} are used, and the request needs {needed}"
        super().__init__(message if retry_after is None else f"{message}; retry after {math.ceil(retry_after)} s")


class KeyUsage:
    """The windows and the limits of one key.

    `rejected`: tokens of requests that were rejected after their texts were tokenized. They count towards no limit.
    """

    __slots__ = ("_limiter", "key_id", "limits", "rejected", "windows")

    def __init__(self, limiter: Limiter, key_id: str) -> None:
        self._limiter, self.key_id, self.windows, self.rejected = limiter, key_id, (Window(), Window()), Window()
        self.limits = NO_LIMITS

    def check(self, index: int, amount: int, now: float, *, size: int = 0) -> None:
        """Raise `LimitError` if `amount` of a resource (0: requests, 1: tokens) does not fit into its window."""
        limit, limiter = self.limits[index], self._limiter
        used, unknown = self._state(index, now)
        others = limiter.others
        if limit is None or used + unknown + amount * (1 + others) <= limit:
            return
        shared = now < limiter.fresh_until
        fits = used + amount <= limit
        # A request larger than the share of one server, or the last one of the limit. The others hear of it before this
        # server admits another one like it.
        if fits and not unknown and (shared or amount == 1):
            return
        resource: Resource = "tokens" if index else "requests"
        own_limit = limit if shared else max(1, limit // (1 + others))
        window = self.windows[index]
        wait: float | None = None
        if shared and fits:
            wait = _SETTLED_S
        elif amount <= own_limit and shared:
            wait = window.seconds_until(used + amount - limit, now)
        elif amount <= own_limit:
            wait = window.seconds_until(used + unknown + amount * (1 + others) - limit, now, limiter.last_heard)
        shown = self._shown(used, unknown, shared)
        raise LimitError(resource, own_limit, shown, amount, wait, size=size)

    def check_size(self, size: int, now: float) -> None:
        """Raise `LimitError` for a request of `size` bytes that must not be tokenized.

        Either nothing remains of the limit, or a whole limit was tokenized in vain in this window. Then only a request
        that fits for sure is tokenized: one with at most as many bytes as tokens remain.
        """
        limit, limiter = self.limits[1], self._limiter
        if limit is None:
            return
        used, unknown = self._state(1, now)
        if used + unknown + max(1, size) * (1 + limiter.others) <= limit:
            return
        shared = now < limiter.fresh_until
        own_limit = limit if shared else max(1, limit // (1 + limiter.others))
        estimate = min(own_limit, math.ceil(size / BYTES_PER_TOKEN) or 1)
        try:
            self.check(1, 1, now)
        except LimitError:
            self.check(1, estimate, now, size=size)  # raises, and says when so many tokens fit
            raise
        self.rejected.advance(int(now // CELL_S))
        if (rejected := self.rejected.own_total) >= limit:
            wait = self.rejected.seconds_until(rejected - limit + 1, now)
            shown = self._shown(used, unknown, shared)
            raise LimitError("tokens", own_limit, shown, estimate, wait, size=size)

    def quotas(self, now: float) -> Quotas:
        """Return the state of the limits of requests and of tokens; None for no limit."""
        shared = now < self._limiter.fresh_until
        requests, tokens = self._quota(0, shared, now), self._quota(1, shared, now)
        return requests, tokens

    def _quota(self, index: int, shared: bool, now: float) -> Quota | None:
        limit, window = self.limits[index], self.windows[index]
        if limit is None:
            return None
        used, unknown = self._state(index, now)
        if (others := self._limiter.others) and not shared:
            limit, used = max(1, limit // (1 + others)), self._shown(used, unknown, shared)
        empty = not (window.own_total or window.foreign_total)
        seconds = 0 if empty else math.ceil((window.newest + CELLS) * CELL_S - now)
        return limit, limit - used if used < limit else 0, seconds

    def used(self, now: float) -> bool:
        """Return whether anything counts."""
        for window in (*self.windows, self.rejected):
            window.advance(int(now // CELL_S))
        return self.rejected.own_total > 0 or any(
            window.own_total or window.foreign_total or window.reserved for window in self.windows
        )

    def own(self, cell: int, oldest: int = 0) -> tuple[Cells, Cells]:
        """Return the counters of this server: of requests, and of tokens. `cell`: the current one."""
        for window in self.windows:
            window.advance(cell)
        requests, tokens = (window.own(oldest) for window in self.windows)
        return requests, tokens

    def note_change(self) -> None:
        """Let the other servers know that the counters of this one changed."""
        if self._limiter.changed is not None:
            self._limiter.changed.setdefault(self, self._limiter.asked)

    def _state(self, index: int, now: float) -> tuple[int, int]:
        """Return what is known to be used, and what other servers may have used since they were heard."""
        window, cell, limiter = self.windows[index], int(now // CELL_S), self._limiter
        if window.cell != cell:
            window.advance(cell)
        unknown = 0
        if limiter.others:
            unknown = window.reserved * limiter.others
            for slot, count in limiter.last_heard:
                unknown += count * window.charged_after(slot)
        return window.own_total + window.foreign_total + window.reserved, unknown

    def _shown(self, used: int, unknown: int, shared: bool) -> int:
        """Return what counts as used towards the limit that is shown."""
        return used if shared else -(-(used + unknown) // (1 + self._limiter.others))


class Charge:
    """What one request was charged."""

    __slots__ = ("_request_slot", "_reserved", "_token_slot", "_tokens", "_usage")

    def __init__(self, usage: KeyUsage, now: float) -> None:
        """Charge one request. Raises `LimitError`."""
        self._usage = usage
        self._tokens = self._reserved = self._token_slot = 0
        usage.check(0, 1, now)
        self._request_slot = usage.windows[0].charge(1, now)
        usage.note_change()

    def charge_body(self, size: int, now: float) -> None:
        """Charge the tokens that `size` bytes cost at least. Raises `LimitError`, also if tokenizing is not allowed."""
        self._usage.check_size(size, now)
        if least := size // MOST_BYTES_PER_TOKEN:
            self._usage.check(1, least, now, size=size)
            self._charge(least, now)

    def tokens(self, amount: int, now: float) -> None:
        """Charge tokens before they are computed, in place of those of the body. Raises `LimitError`."""
        if amount <= self._tokens:
            return
        try:
            self._usage.check(1, amount - self._tokens, now)
        except LimitError:
            self.in_vain(amount, now)
            raise
        self._usage.windows[1].give_back(self._token_slot, self._tokens)
        self._charge(amount, now)

    def _charge(self, amount: int, now: float) -> None:
        self._token_slot, self._tokens = self._usage.windows[1].charge(amount, now), amount
        self._usage.note_change()

    def in_vain(self, amount: int, now: float) -> None:
        """Count tokens of a request that was rejected after its texts were tokenized."""
        self._usage.rejected.advance(int(now // CELL_S))
        self._usage.rejected.charge(amount, now)

    def reserve(self, amount: int, now: float) -> None:
        """Keep tokens for a request whose use is known at its end only. Raises `LimitError`."""
        amount = max(0, amount - self._tokens)
        self._usage.check(1, amount, now)
        self._usage.windows[1].reserved += amount
        self._reserved += amount

    def settle(self, amount: int, now: float) -> None:
        """Charge the tokens that were used, in place of the reserved ones."""
        self._release()
        window = self._usage.windows[1]
        window.advance(int(now // CELL_S))
        window.charge(max(0, amount - self._tokens), now)
        self._usage.note_change()

    def close(self, *, give_back: bool, computed: int = 0) -> None:
        """End the request. `give_back`: it failed, so it costs only the tokens that were `computed`."""
        if self._reserved:
            self._release()
        if give_back:
            requests, tokens = self._usage.windows
            if not computed:
                requests.give_back(self._request_slot, 1)
            tokens.give_back(self._token_slot, max(0, self._tokens - computed))
            self._usage.note_change()

    def _release(self) -> None:
        self._usage.windows[1].reserved -= self._reserved
        self._reserved = 0


class Limiter:
    """The use of all keys on this server.

    `replicas`: the number of servers that share the limits. `exchanges`: whether they tell each other their counters.
    `others`: how many other servers there are. `last_heard`: slots, and how many of them were last heard then.
    """

    def __init__(self, replicas: int = 1, *, exchanges: bool = False) -> None:
        self._replicas = replicas
        self._usages: dict[str, KeyUsage] = {}
        self._many, self._forgot = _MANY_KEYS, -math.inf
        self._heard: dict[str, float] = {}
        self._waiting: list[str] = []  # keys whose counters `next_counters` has not returned yet
        self._part = 0  # how many of them it returns at a time
        # Keys that changed, in the order in which they are sent, and the last call of `changes` before they did.
        self.changed: dict[KeyUsage, float] | None = {} if exchanges else None
        self.asked = 0.0  # the last call of `changes`
        self._updated = -math.inf
        self._sends_all = self._sends_all_again = False  # whether `next_counters` returns all keys as fast as it can
        self._all_since = math.inf  # the first change that the others learn from it only
        # Servers that were started again are other ones until the earlier start is silent.
        self._most_others = 2 * replicas + 16
        self.others = replicas - 1
        self.last_heard: LastHeard = ((0, self.others),) if self.others else ()
        self.fresh_until = -math.inf  # until when the counters of all other servers are known

    def usage(self, key_id: str, limits: Limits, now: float) -> KeyUsage:
        """Return the use of a key, to which requests are charged. Its limits can be others than before."""
        usage = self._usages.get(key_id) or self._new_usage(key_id, now)
        usage.limits = limits
        return usage

    def changes(self, now: float) -> Counters:
        """Return the newest counters of this server, for the others: of the next keys that changed."""
        self.asked = now
        if not self.changed:
            return {}
        found = list(itertools.islice(self.changed, _MANY_AT_ONCE))
        for usage in found:
            del self.changed[usage]
        cell = int(now // CELL_S)
        return {usage.key_id: usage.own(cell, cell - 1) for usage in found}

    def sent_up_to(self, now: float) -> float:
        """Return up to when the others know all counters, after those of `changes` and `next_counters` were sent."""
        return min(next(iter((self.changed or {}).values()), now), self._all_since, now)

    def next_counters(self, now: float) -> dict[str, Counters]:
        """Return all counters of the next keys, by server; that of this one is "". After `_CALLS`, it begins again.

        Those of servers that are not heard any more are among them: a server that starts needs to know them. After
        `send_all`, it may be the next start of one that was heard just now.
        """
        silent = now - (DELAY_S if self._sends_all else EXCHANGE_TIMEOUT_S)
        if not self._waiting:
            calls = _CALLS_KNOWN if now < self.fresh_until else _CALLS
            self._waiting, self._part = list(self._usages), math.ceil(len(self._usages) / calls)
        cell, count, found = int(now // CELL_S), min(self._part, _MANY_AT_ONCE), dict[str, Counters]()
        for key_id in self._waiting[:count]:
            usage = self._usages.get(key_id)
            if usage is None:
                continue
            own = usage.own(cell)
            if own != ({}, {}):
                found.setdefault("", {})[key_id] = own
            for replica in {*usage.windows[0].foreign, *usage.windows[1].foreign}:
                if self._heard.get(replica, -math.inf) < silent:
                    requests, tokens = (window.foreign.get(replica, {}) for window in usage.windows)
                    found.setdefault(replica, {})[key_id] = requests, tokens
        del self._waiting[:count]
        if not self._waiting:
            self._sends_all, self._all_since = False, math.inf
            if self._sends_all_again:
                self._sends_all_again = False
                self.send_all()
        return found

    def send_all(self) -> None:
        """Let `next_counters` begin again, with as many keys at a time as it can return: others may lack some of them.

        If it already does, it begins again after the last one, so calls in any number let all keys be sent.
        """
        if self._sends_all:
            self._sends_all_again = True
            return
        self._waiting, self._part, self._sends_all = list(self._usages), _MANY_AT_ONCE, True
        if self.changed and len(self.changed) > _MANY_AT_ONCE:  # they are among them
            self._all_since, self.changed = next(iter(self.changed.values())), {}

    def merge(self, replica: str, counters: Counters, now: float) -> None:
        """Take over counters of the server `replica` (one start of it)."""
        cell = int(now // CELL_S)
        for key_id, cells in counters.items():
            usage = self._usages.get(key_id)
            if usage is None:
                if len(self._usages) >= _MOST_KEYS:
                    if now >= self._forgot + PERIOD_S:
                        self._forget(now)
                    continue
                usage = self._new_usage(key_id, now)
            for window, counts in zip(usage.windows, cells, strict=True):
                window.advance(cell)
                if replica in window.foreign or len(window.foreign) < 2 * self._most_others:
                    window.merge(replica, counts)

    def heard(self, replica: str, sent: float, now: float) -> None:
        """Note that what `replica` counted up to `sent` was merged. What follows from it is up to `update`."""
        if replica not in self._heard and len(self._heard) >= self._most_others:
            oldest = min(self._heard, key=self._heard.__getitem__)
            if self._heard[oldest] > now - EXCHANGE_TIMEOUT_S:
                return
            del self._heard[oldest]
        self._heard[replica] = max(min(sent, now), self._heard.get(replica, -math.inf))

    def update(self, now: float) -> None:
        """Compute what the times at which other servers were heard mean. Called about every 100 ms."""
        if now < self._updated - _SET_BACK_S:
            # What was charged before has later times than now, so it must not seem to be known to the others.
            self._heard = {}
        self._updated = now
        self._heard = {each: min(time, now) for each, time in self._heard.items() if time > now - CELLS * CELL_S}
        times = sorted(self._heard.values(), reverse=True)
        current = sum(time > now - EXCHANGE_TIMEOUT_S for time in times)
        # Of a server that was started again, the earlier start is silent, and does not count.
        self.others = max(self._replicas - 1, current)
        slots = Counter(int((time - DELAY_S) // SLOT_S) for time in times[: self.others])
        if (missing := self.others - len(times)) > 0:
            slots[0] += missing
        self.last_heard = tuple(slots.items())
        self.fresh_until = times[self.others - 1] + EXCHANGE_TIMEOUT_S if missing <= 0 else -math.inf

    def _new_usage(self, key_id: str, now: float) -> KeyUsage:
        if len(self._usages) >= self._many:
            self._forget(now)
        found = self._usages[key_id] = KeyUsage(self, key_id)
        return found

    def _forget(self, now: float) -> None:
        """Forget keys of which nothing counts."""
        self._forgot = now
        self._usages = {each: usage for each, usage in self._usages.items() if usage.used(now)}
        if self.changed:  # no relay has asked for them
            kept = set(self._usages.values())
            self.changed = {usage: since for usage, since in self.changed.items() if usage in kept}
        self._many = max(_MANY_KEYS, 2 * len(self._usages))
