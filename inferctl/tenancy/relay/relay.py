"""Brings usage events to the ledger: from the outboxes of this machine, or from a broker. Runs `AccessRelay` too.

Nothing that a server needs depends on it. It may be killed at any point: what the ledger has is written in one
transaction with how far it got, and the outboxes keep the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from inferctl.config.spec import Access, Metering
from inferctl.core.errors import NotReadyError, UsageError
from inferctl.tenancy.metering import outbox, sink
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


class Relay:
    """One relay. `metering`: None without usage events. `consume`: store those of the broker, and read no outboxes."""

    def __init__(self, metering: Metering | None, access: Access, *, consume: bool = False) -> None:
        self._metering, self._access, self._consume = metering is not None, access, consume
        self._settings = metering or Metering.model_construct()
        self._ending = asyncio.Event()
        self._ledger: Ledger | None = None
        self._broker: EventBroker | None = None
        self._answering: EventBroker | None = None
        self._sending: asyncio.Task[int] | None = None  # to the HTTP sink, which may take any time
        self._watermarks: dict[str, int] = {}
        self._progress: dict[str, PublishProgress] = {}
        self._logged: dict[str, float] = {}

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
        outboxes = Outboxes(data)
        try:
            await self._repeat(lambda: self._read_outboxes(outboxes))
        finally:
            outboxes.close()

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

    async def _read_outboxes(self, outboxes: Outboxes) -> bool:
        await asyncio.to_thread(outboxes.refresh)
        if self._settings.broker:
            return await self._publish(outboxes)
        ledger = await self._opened()
        more = await asyncio.to_thread(self._store, outboxes, ledger)
        return await self._send(ledger, f"{outbox.instance(Path(self._settings.data))}/") or more

    def _store(self, outboxes: Outboxes, ledger: Ledger) -> bool:
        """Store the next batches of all outboxes, and return whether there are more."""
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
        return more

    async def _publish(self, outboxes: Outboxes) -> bool:
        """Publish the next batches of all outboxes, and return whether there are more."""
        from inferctl.tenancy.metering.broker import PublishProgress

        broker = await self._connected()
        sources = outboxes.sources
        for source in sources:
            if source not in self._progress:
                self._progress[source] = PublishProgress(outboxes.confirmed(source))
        more = False
        for source in sources:
            progress = self._progress[source]
            batches = await asyncio.to_thread(outboxes.read, source, progress.published, _ROWS)
            for batch in batches:
                await broker.publish(batch)
                progress.published = batch.last
            more |= len(batches) == _ROWS
        if sources and not more:
            try:
                watermarks = dict.fromkeys(sources, 0) | await broker.watermarks(sources)
            except NotReadyError as error:  # the relay with the ledger is gone: publish meanwhile
                self._report(error)
                watermarks = {}
            for source, watermark in watermarks.items():
                self._progress[source].update(watermark)
                await asyncio.to_thread(outboxes.confirm, source, watermark)
        return more

    async def _store_messages(self) -> bool:
        ledger = await self._opened()
        broker = await self._connected()
        if broker is not self._answering:  # it answers until its connection breaks
            await broker.answer_watermarks(ledger)
            self._answering = broker
        stored = await broker.store(ledger)
        return await self._send(ledger, "") or stored > 0

    async def _send(self, ledger: Ledger, prefix: str) -> bool:
        """Send the next events to the HTTP sink. Its errors and its pauses do not delay the ledger."""
        settings = self._settings
        if not settings.sink:
            return False
        try:
            if self._sending is None:
                token = Path(settings.sink_token_file).read_text().strip() if settings.sink_token_file else None
                work = asyncio.to_thread(sink.send, ledger, settings.sink, prefix, token)
                self._sending = asyncio.create_task(work)
            await asyncio.wait({self._sending}, timeout=_RETRY_S)
            if not self._sending.done():
                return True
            sending, self._sending = self._sending, None
            return bool(sending.result())
        except (sink.SinkUnavailableError, OSError) as error:
            self._report(error)
            return False

    async def _opened(self) -> Ledger:
        if self._ledger is None:
            self._ledger = await asyncio.to_thread(Ledger.open, self._settings.ledger_url)
        return self._ledger

    async def _connected(self) -> EventBroker:
        from inferctl.tenancy.metering import broker

        if self._broker and self._broker.broken:
            await self._broker.close()
            self._broker = None
        if self._broker is None:
            assert self._settings.broker
            self._broker = await broker.connect(self._settings.broker)
        return self._broker

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
