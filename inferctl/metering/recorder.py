"""The sink of usage events in a server process: a list in memory, and a thread that writes it to the outbox."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence

import orjson

from inferctl.metering import cloud_event
from inferctl.metering.cloud_event import Origin, Usage
from inferctl.metering.outbox import Outbox

log = logging.getLogger("inferctl.metering")

# A SIGKILL loses the events of this time. A commit needs 2 to 16 ms of the thread, so shorter gains little.
FLUSH_S = 0.02
# Of one row. To encode more would block the event loop, which needs the same interpreter lock, for over half a ms.
_BATCH_EVENTS = 200
_RETRY_S = 0.2
_FREE_S = 0.5
_LOG_S = 30.0
# After an event could not be encoded, a recorder whose events are required accepts none for this long.
_REFUSE_S = 30.0
# The code of requests that are rejected because their events could not be recorded. They leave none.
UNAVAILABLE = "metering_unavailable"
# Requests in flight, which were accepted before the memory was full.
_IN_FLIGHT = 8192


class Recorder:
    """Gives each event its number, and writes it to `outbox` within about 20 ms.

    If the outbox cannot be written, up to `max_pending` events wait in memory. Then `full` is True. A server that must
    meter every request rejects requests while it is, and has `required` set, so that those in flight are recorded too.
    Other servers drop events: their numbers are missing in the ledger, and `dropped` counts them. An event that cannot
    be encoded is dropped too; if events are required, `full` is then True for `_REFUSE_S`.
    """

    def __init__(self, outbox: Outbox, origin: Origin, *, required: bool = False, max_pending: int = 100_000) -> None:
        self.origin, self.required = origin, required
        self.dropped = 0
        self._outbox, self._max_pending = outbox, max_pending
        self._limit = max_pending + (_IN_FLIGHT if required else 0)
        self._issued = self._written = 0
        self._pending: deque[tuple[int, float, Usage]] = deque()
        self._encoded: tuple[int, int, int, bytes] | None = None  # a batch that was not written yet
        self._oldest_ms: int | None = None  # of what is in the outbox
        self._failed_at = self._logged_at = 0.0
        self._refused_until = -math.inf
        self._awake = False
        self._wake = threading.Event()
        self._deadline: float | None = None  # of `close`
        self._thread = threading.Thread(target=self._run, name="inferctl-outbox", daemon=True)
        self._thread.start()

    def record(self, usage: Usage) -> None:
        """Record a finished request. Called for each request on the event loop, so it only appends to a list."""
        waiting = len(self._pending)
        if self.required and usage.code == UNAVAILABLE and self.full:
            return
        self._issued = number = self._issued + 1
        self._outbox.issue(number)
        if waiting >= self._limit:
            self.dropped += 1
            return
        self._pending.append((number, time.time(), usage))
        if not self._awake:
            self._awake = True
            self._wake.set()

    @property
    def full(self) -> bool:
        """Whether there is no place for the event of another request."""
        refuses = self.required and time.monotonic() < self._refused_until
        return refuses or len(self._pending) >= self._max_pending

    @property
    def issued(self) -> int:
        """How many numbers were given to events."""
        return self._issued

    @property
    def depth(self) -> int:
        """How many events the ledger does not have yet."""
        return self._issued - self._outbox.watermark

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
        return not self._thread.is_alive() and not self._pending and self._encoded is None

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
        while not self._write() and time.monotonic() < self._deadline:
            time.sleep(0.05)
        if not (self._pending or self._encoded):
            self._end(self._deadline)
        self._outbox.close()

    def _write(self) -> bool:
        """Write all pending events, and free what the ledger has. Return whether that succeeded."""
        try:
            self._free()
            while self._encoded or self._pending:
                batch = self._encoded = self._encoded or self._encode()
                if batch is None:
                    continue
                self._outbox.append(*batch)
                self._written, self._encoded = batch[1], None
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

    def _encode(self) -> tuple[int, int, int, bytes] | None:
        """Return the next batch; None if none of its events can be encoded."""
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
        return self._written + 1, items[-1][0], int(1000 * items[0][1]), content

    def _content(self, items: Sequence[tuple[int, float, Usage]]) -> bytes:
        return orjson.dumps(cloud_event.requests(self.origin, items))

    def _encodable(self, items: Sequence[tuple[int, float, Usage]], error: Exception) -> list[tuple[int, float, Usage]]:
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
        """Write the event of the end. Without it, the worker reports that the process was killed."""
        while True:
            try:
                self._outbox.end(clean=True)
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
                "Free some disk space, raise metering.outbox_size, or check the worker and its ledger.",
                error,
                len(self._pending),
                self._max_pending,
                after,
                self.dropped,
            )
