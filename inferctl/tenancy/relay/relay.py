"""Brings usage events to the ledger: from the outboxes of this machine, or from a broker. Runs `AccessRelay` too.

Nothing that a server needs depends on it. It may be killed at any point: what the ledger has is written in one
transaction with how far it got, and the outboxes keep the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferctl.config.spec import Access, Metering
from inferctl.core import outputs
from inferctl.core.errors import NotReadyError, UsageError
from inferctl.tenancy.access.budgets import TOTALS_FILE
from inferctl.tenancy.metering import outbox
from inferctl.tenancy.metering.ledger import Ledger
from inferctl.tenancy.metering.outbox import EventBatch
from inferctl.tenancy.metering.outboxes import Outboxes

if TYPE_CHECKING:
    from inferctl.tenancy.metering.broker import EventBroker, PublishProgress

log = logging.getLogger("inferctl.relay")

_INTERVAL_S = 0.25
_RETRY_S = 1.0
_LOG_S = 30.0
# Of one outbox, and of all of them in one transaction. A row has up to 200 events.
_ROWS, _MOST_ROWS = 50, 200
_ONLY_RELAY_S = 0.5
_TOTALS_S = 1.0


class Relay:
    """One relay. `metering`: None without usage events. `consume`: store those of the broker, and read no outboxes."""

    def __init__(self, metering: Metering | None, access: Access, *, consume: bool = False) -> None:
        self._metering, self._access, self._consume = metering is not None, access, consume
        self._settings = metering or Metering.model_construct()
        self._ending = asyncio.Event()
        self._ledger: Ledger | None = None
        self._broker: EventBroker | None = None
        self._watermarks: dict[str, int] = {}
        self._progress: dict[str, PublishProgress] = {}
        self._logged: dict[str, float] = {}
        self._totals_at, self._asked_at = -math.inf, 0.0

    def end(self) -> None:
        """Let `run` store what is left and return."""
        self._ending.set()

    async def run(self) -> None:
        """Work until `end`. Raises `UsageError` for an invalid address, `OSError` for a folder that is not writable."""
        parts: list[Callable[[], Awaitable[None]]] = [self._bring_events] if self._metering else []
        if self._access.has_relay:
            from inferctl.tenancy.relay.access import AccessRelay

            access = AccessRelay(self._access)
            parts.append(lambda: access.run(self._ending))
        if len(parts) == 1:
            await parts[0]()
        else:
            await asyncio.gather(*map(self._try_again, parts))

    async def _try_again(self, part: Callable[[], Awaitable[None]]) -> None:
        """Run one of several parts. Its errors do not end the others."""
        reported = False
        while True:
            try:
                await part()
                return
            except (UsageError, OSError) as error:
                if self._ending.is_set():
                    raise
                if not reported:
                    log.error("%s; trying again", getattr(error, "message", error))
                reported = True
                await self._wait(_RETRY_S)

    async def _bring_events(self) -> None:
        try:
            if self._consume:
                await self._repeat(self._store_messages)
                return
            data = Path(self._settings.data)
            while not self._ending.is_set():
                with outbox.exclusive(data) as alone:
                    if alone:
                        await self._empty_outboxes(data)
                        return
                # The relay of another server in this folder also reads the outbox of this one.
                await self._wait(_ONLY_RELAY_S)
        finally:
            if self._broker:
                await self._broker.close()
            if self._ledger:
                self._ledger.close()
            self._broker = self._ledger = None

    async def _empty_outboxes(self, data: Path) -> None:
        with contextlib.closing(Outboxes(data)) as outboxes:
            if self._settings.broker:
                await self._repeat(lambda: self._publish(outboxes))
            else:
                await self._repeat(lambda: asyncio.to_thread(self._store, outboxes))

    async def _repeat(self, step: Callable[[], Awaitable[bool]]) -> None:
        """Call `step`, which returns whether more is waiting, until `end` and nothing is."""
        while True:
            ending = self._ending.is_set()
            try:
                more, pause = await step(), _INTERVAL_S
            except (NotReadyError, OSError) as error:
                self._report(error)
                # Without what is not available, the rest stays in the outboxes.
                more, pause = False, _RETRY_S
            if ending and not more:
                return
            if not more:
                await self._wait(pause)

    def _store(self, outboxes: Outboxes) -> bool:
        """Store the next batches of all outboxes, and return whether there are more."""
        outboxes.refresh()
        ledger = self._ledger = self._ledger or Ledger.open(self._settings.ledger_url)
        unknown = [source for source in outboxes.sources if source not in self._watermarks]
        if unknown:
            self._watermarks |= dict.fromkeys(unknown, 0) | ledger.watermarks(unknown)
        batches: list[EventBatch] = []
        more = False
        for source in outboxes.sources:
            rows = outboxes.read(source, self._watermarks[source], _ROWS)
            more |= len(rows) == _ROWS
            batches += rows
            if len(batches) >= _MOST_ROWS:
                self._watermarks |= ledger.apply(batches)
                batches.clear()
        if batches:
            self._watermarks |= ledger.apply(batches)
        for source in outboxes.sources:
            outboxes.confirm(source, self._watermarks[source])
        if self._settings.prices and not more and self._totals_due():
            self._write_totals(ledger.budgets(time.time()))
        return more

    def _totals_due(self) -> bool:
        due = time.monotonic() >= self._totals_at + _TOTALS_S
        if due:
            self._totals_at, self._asked_at = time.monotonic(), time.time()
        return due

    def _write_totals(self, totals: dict[str, Any]) -> None:
        """Write what the ledger has of budgets, for servers that start."""
        content = json.dumps({"at": self._asked_at, "totals": totals})
        outputs.replace(Path(self._settings.data) / TOTALS_FILE, content, sync=False)

    async def _publish(self, outboxes: Outboxes) -> bool:
        """Publish the next batches of all outboxes, and return whether there are more."""
        from inferctl.tenancy.metering.broker import PublishProgress

        await asyncio.to_thread(outboxes.refresh)
        broker, _ = await self._connected()
        more = False
        for source in outboxes.sources:
            if source not in self._progress:
                self._progress[source] = PublishProgress(outboxes.confirmed(source))
            progress = self._progress[source]
            batches = await asyncio.to_thread(outboxes.read, source, progress.published, _ROWS)
            for batch in batches:
                await broker.publish(batch)
                progress.published = batch.last
            more |= len(batches) == _ROWS
        if not more and (sources := outboxes.sources):
            watermarks = await broker.watermarks(sources)
            for source in sources:
                self._progress[source].update(watermarks.get(source, 0))
                await asyncio.to_thread(outboxes.confirm, source, self._progress[source].watermark)
        if self._settings.prices and not more and self._totals_due():
            await asyncio.to_thread(self._write_totals, await broker.totals())
        return more

    async def _store_messages(self) -> bool:
        """Store the next messages of the broker, and return whether there may be more."""
        if self._ledger is None:
            self._ledger = await asyncio.to_thread(Ledger.open, self._settings.ledger_url)
        broker, new = await self._connected()
        if new:  # it answers until its connection breaks
            await broker.answer(self._ledger)
        return await broker.store(self._ledger) > 0

    async def _connected(self) -> tuple[EventBroker, bool]:
        """Return the broker, and whether the connection is new."""
        from inferctl.tenancy.metering import broker

        if self._broker and not self._broker.broken:
            return self._broker, False
        if self._broker:
            await self._broker.close()
            self._broker = None
        assert self._settings.broker
        self._broker = await broker.connect(self._settings.broker)
        return self._broker, True

    async def _wait(self, seconds: float) -> None:
        """Wait, but not if the relay is ending."""
        if self._ending.is_set():
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), seconds)

    def _report(self, error: Exception) -> None:
        """Log an error, but the same one not again at once."""
        kind, now = type(error).__name__, time.monotonic()
        if now - self._logged.get(kind, -_LOG_S) >= _LOG_S:
            self._logged[kind] = now
            log.warning("%s; usage events wait in the outbox", getattr(error, "message", error))
