"""The sink of usage events in a server process: a list in memory, and a thread that writes it to the outbox."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from inferctl.tenancy.metering import usage_event
from inferctl.tenancy.metering.outbox import Outbox
from inferctl.tenancy.metering.usage_event import Item, Origin, UsageEvent

log = logging.getLogger("inferctl.metering")

# A SIGKILL loses the events of this time. A commit needs 2 to 16 ms of the thread, so shorter gains little.
FLUSH_S = 0.02
# Of one row. To encode more would block the event loop, which needs the same interpreter lock, for over half a ms.
_BATCH_EVENTS = 200
_RETRY_S = 0.2
_FREE_S = 0.5
_LOG_S = 30.0
_DAY_S = 86_400
# After an event could not be encoded, a recorder whose events are required accepts none for this long.
_REFUSE_S = 30.0
# Requests that used nothing, such as those above a limit, are free for who sends them. Otherwise each one would fill
# the outbox: so those with the same key, endpoint, model, status and code become one event per second.
_SUM_S = 1.0
# A gateway or a provider of tokens may name any number of callers. Those after the first ones have one sum together.
_MAX_SUMS = 1000
_OTHERS = "(others)"
# Above this share of the outbox, sums wait in memory and grow, so that they never fill the place of other events.
_SUMS_SHARE = 0.5
# The code of requests that are rejected because the events of others could not be recorded.
UNAVAILABLE = "metering_unavailable"
# Requests in flight, which were accepted before the memory was full.
_IN_FLIGHT = 8192


class EventRecorder:
    """Gives each event its number, and writes it to `outbox` within about 20 ms. Sums of free requests take a second.

    If the outbox cannot be written, up to `max_pending` events wait in memory. Then `full` is True. A server that must
    meter every request rejects requests while it is, and has `required` set, so that those in flight are recorded too.
    Other servers drop events: their numbers are missing in the ledger, and `dropped` counts them. An event that cannot
    be encoded is dropped too; if events are required, `full` is then True for `_REFUSE_S`.

    `origin`: of all requests, except those for a model in `origins`.
    """

    def __init__(self, outbox: Outbox, origin: Origin, *, required: bool = False, max_pending: int = 100_000) -> None:
        self.origin, self.required = origin, required
        self.origins: Mapping[str, Origin] = {}
        self.dropped = 0
        self._outbox, self._max_pending = outbox, max_pending
        self._limit = max_pending + (_IN_FLIGHT if required else 0)
        self._lock = threading.Lock()  # of the numbers, `_pending` and `_sums`
        self._issued = self._written = 0
        self._pending: deque[Item] = deque()
        self._sums: dict[tuple[Any, ...], tuple[int, float, UsageEvent]] = {}  # their first value: the key id
        self._summed = 0  # requests in sums that are not on disk, without one for each number of a sum
        self._sums_began = 0.0
        self._encoded: tuple[tuple[int, int, int, bytes], int] | None = (
            None  # a batch to write, and its part of `_summed`
        )
        self._oldest_ms: int | None = None  # of what is in the outbox
        self._failed_at = self._logged_at = 0.0
        self._refused_until = -math.inf
        self._awake = False
        self._wake = threading.Event()
        self._deadline: float | None = None  # of `close`
        self._thread = threading.Thread(target=self._run, name="inferctl-outbox", daemon=True)
        self._thread.start()

    def record(self, usage: UsageEvent) -> None:
        """Record a finished request. Called for each request on the event loop, so it only adds to a list or a sum."""
        at = time.time()
        with self._lock:
            if usage_event.is_free(usage):
                self._add(usage, at)
                self._summed += 1
            elif len(self._pending) >= self._limit:
                self._issued += 1
                self.dropped += 1
            else:
                self._issued += 1
                self._pending.append(Item(self._issued, at, usage))
            # With the requests in sums, which get fewer numbers later: so the ledger can tell what a SIGKILL lost.
            self._outbox.issue(self._issued + self._summed)
        if not self._awake:
            self._awake = True
            self._wake.set()

    def _add(self, usage: UsageEvent, at: float) -> None:
        """Add a request that used nothing to its sum."""
        # A sum is of one day, because it counts on that of its last request.
        kind = (usage.endpoint, usage.model, usage.status, usage.code, at // _DAY_S)
        key = (usage.key_id, *kind)
        if key not in self._sums and len(self._sums) >= _MAX_SUMS:
            key = (_OTHERS, *kind)
        if not self._sums:
            self._sums_began = time.monotonic()
        known = self._sums.get(key)
        self._sums[key] = (known[0] + 1 if known else 1, at, usage)

    @property
    def source(self) -> str:
        """The source of the events."""
        return self._outbox.source

    @property
    def full(self) -> bool:
        """Whether there is no place for the event of another request."""
        refuses = self.required and time.monotonic() < self._refused_until
        return refuses or len(self._pending) >= self._max_pending

    @property
    def issued(self) -> int:
        """How many numbers were given to events. Sums get theirs when they are written."""
        return self._issued

    @property
    def depth(self) -> int:
        """How many events the ledger does not have yet."""
        return self._issued + len(self._sums) - self._outbox.watermark

    @property
    def age(self) -> float:
        """Seconds since the oldest event that the ledger does not have; 0 without one."""
        oldest = self._oldest_ms
        if oldest is not None:
            return max(0.0, time.time() - oldest / 1000)
        try:
            return max(0.0, time.time() - self._pending[0][1])
        except IndexError:
            return 0.0

    def close(self, seconds: float) -> bool:
        """Write what is in memory and the event of a clean end. Return whether that was possible in `seconds`."""
        self._deadline = time.monotonic() + seconds
        self._wake.set()
        self._thread.join(seconds + 1)
        return not self._thread.is_alive() and not (self._sums or self._pending or self._encoded)

    def _run(self) -> None:
        while self._deadline is None:
            self._wake.wait(_FREE_S if self.depth else None)
            if self._wake.is_set() and self._deadline is None:
                time.sleep(FLUSH_S)
            # In this order: what is recorded from now on sets the event again.
            self._wake.clear()
            self._awake = False
            self._write()
            if self._failed_at:
                time.sleep(_RETRY_S)
                self._wake.set()
        self._end_sums()
        while not self._write() and time.monotonic() < self._deadline:
            time.sleep(0.05)
        if not (self._pending or self._encoded):
            self._end(self._deadline)
        self._outbox.close()

    def _write(self) -> bool:
        """Write all pending events, and free what the ledger has. Return whether that succeeded."""
        try:
            self._free()
            if self._sums and self._has_place():
                self._end_sums()
            while self._encoded or self._pending:
                self._encoded = self._encoded or self._encode()
                if self._encoded is None:
                    continue
                batch, summed = self._encoded
                self._outbox.append(*batch)
                self._written, self._encoded = batch[1], None
                if summed:
                    with self._lock:
                        self._summed -= summed
                        self._outbox.issue(self._issued + self._summed)
                if self._oldest_ms is None:
                    self._oldest_ms = batch[2]
        except Exception as error:  # noqa: BLE001  # without this thread, no event would be recorded any more
            self._failed(error)
            return False
        if self._failed_at:
            seconds = time.monotonic() - self._failed_at
            log.warning("the outbox is written again after %.0f s; dropped events: %d", seconds, self.dropped)
            self._failed_at = self._logged_at = 0.0
        return True

    def _has_place(self) -> bool:
        """Return whether the sums are complete, and may take their place in the outbox."""
        complete = time.monotonic() - self._sums_began >= _SUM_S
        # What is in memory has no place in the outbox now.
        return complete and not self._failed_at and self._outbox.used() < _SUMS_SHARE

    def _end_sums(self) -> None:
        """Let each sum become an event."""
        with self._lock:
            for (key_id, *_), (count, at, usage) in self._sums.items():
                self._issued += 1
                self._summed -= 1
                self._pending.append(Item(self._issued, at, usage, count, key_id))
            self._sums.clear()

    def _encode(self) -> tuple[tuple[int, int, int, bytes], int] | None:
        """Return the next batch, and its part of `_summed`; None if none of its events can be encoded."""
        items = [self._pending.popleft() for _ in range(min(_BATCH_EVENTS, len(self._pending)))]
        try:
            content = self._content(items)
        except Exception as error:  # noqa: BLE001  # one event must not take the others with it
            items = self._encodable(items, error)
            if not items:
                return None
            try:
                content = self._content(items)
            except Exception:  # as without memory, which may pass
                self._pending.extendleft(reversed(items))
                raise
        # From the number after the last batch on, so that dropped events show as missing.
        batch = self._written + 1, items[-1].number, int(1000 * items[0].at), content
        return batch, sum(item.requests - 1 for item in items)

    def _content(self, items: Sequence[Item]) -> bytes:
        return orjson.dumps(usage_event.requests(self.origin, items, self.origins))

    def _encodable(self, items: Sequence[Item], error: Exception) -> list[Item]:
        """Return the events of a batch that can be encoded, and count the others as dropped."""
        found = []
        for item in items:
            try:
                self._content([item])
                found.append(item)
            except Exception as reason:  # noqa: BLE001
                error = reason
        if lost := len(items) - len(found):
            self.dropped += lost
            self._refused_until = time.monotonic() + _REFUSE_S
            after = f" Requests are rejected with 503 for {_REFUSE_S:g} s." if self.required else ""
            # Without the text of the error, which may quote what a client sent.
            log.error(
                "USAGE EVENTS WERE LOST, because they cannot be encoded: %d (%s). Dropped: %d.%s",
                lost,
                type(error).__name__,
                self.dropped,
                after,
            )
        return found

    def _free(self) -> None:
        if self._outbox.free():
            self._oldest_ms = self._outbox.oldest_ms()

    def _end(self, deadline: float) -> None:
        """Write the event of the end. Without it, the relay reports that the process was killed."""
        while True:
            try:
                self._outbox.end(self._written)
                return
            except Exception as error:  # noqa: BLE001  # `_run` must close the outbox
                self._failed(error)
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)

    def _failed(self, error: Exception) -> None:
        now = time.monotonic()
        self._failed_at = self._failed_at or now
        # A lock that is released soon is no news.
        if now - self._failed_at > 1 and (not self._logged_at or now - self._logged_at > _LOG_S):
            self._logged_at = now
            after = "then requests are rejected with 503" if self.required else "then they are dropped"
            log.error(
                "USAGE EVENTS CANNOT BE WRITTEN: %s. In memory: %d of at most %d, %s. Dropped: %d. "
                "Free some disk space, raise metering.outbox_size, or check the relay and its ledger.",
                error,
                len(self._pending),
                self._max_pending,
                after,
                self.dropped,
            )
