"""All outboxes of a data folder, as the relay sees them."""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path

from inferctl.tenancy.metering import outbox, usage_event
from inferctl.tenancy.metering.outbox import EventBatch, OutboxReader

log = logging.getLogger("inferctl.metering")

_LOG_S = 30.0


class Outboxes:
    """Reads the outboxes in `data`, and takes over those of processes that ended.

    One that cannot be read delays no other one. If its process ended, the numbers that it lost are in the ledger.
    """

    def __init__(self, data: Path) -> None:
        self._data = data
        self._readers: dict[str, OutboxReader] = {}
        self._ends: dict[str, EventBatch] = {}
        self._confirmed: dict[str, int] = {}
        self._logged: dict[str, float] = {}

    @property
    def sources(self) -> list[str]:
        """The sources of the events, as of the last `refresh`."""
        return list(self._readers)

    def refresh(self) -> None:
        """Find new outboxes, and take over those whose process ended."""
        known = {reader.folder for reader in self._readers.values()}
        for folder in outbox.folders(self._data):
            if folder not in known:
                reader = OutboxReader(folder)
                self._readers[reader.source] = reader
        for reader in self._readers.values():
            try:
                reader.take_over()
            except OSError as error:
                self._report(reader, error)

    def read(self, source: str, after: int, limit: int) -> list[EventBatch]:
        """Return up to `limit` batches with numbers above `after`; none if the outbox cannot be read now.

        After those of a process that ended without it, there is the event of its end.
        """
        try:
            return self._read(source, after, limit)
        except (OSError, sqlite3.Error) as error:
            self._report(self._readers[source], error)
            return []

    def _read(self, source: str, after: int, limit: int) -> list[EventBatch]:
        reader = self._readers[source]
        found = reader.read(after, limit)
        if reader.damage:
            self._report(reader, reader.damage)
        if reader.issued is None or len(found) == limit:
            return found
        after = found[-1].last if found else after
        # A ledger that was restored may lack what was freed.
        covered = max(after, min(self.confirmed(source), reader.issued + 1))
        if covered > reader.issued:
            return found
        if source not in self._ends:
            number, now = reader.issued + 1, int(1000 * time.time())
            content = usage_event.end(number, now, clean=False)
            self._ends[source] = EventBatch(source, covered + 1, number, now, content, covered + 1)
        end = self._ends[source]
        return [*found, end] if end.last > after else found

    def confirmed(self, source: str) -> int:
        """Return the last watermark that `confirm` wrote, in this or an earlier process."""
        if source not in self._confirmed:
            self._confirmed[source] = outbox.read_watermark(self._readers[source].folder)
        return self._confirmed[source]

    def confirm(self, source: str, watermark: int) -> None:
        """Let the server process free its events up to `watermark`. Remove the outbox of an ended one without others.

        The files of a damaged one are kept under another name.
        """
        reader = self._readers[source]
        try:
            if self.confirmed(source) != watermark:
                outbox.write_watermark(reader.folder, watermark)
                self._confirmed[source] = watermark
            if reader.issued is None or self._read(source, watermark, 1):
                return
            reader.remove()
        except (OSError, sqlite3.Error) as error:
            self._report(reader, error)
            return
        if reader.damage:
            log.error("the events that %s lost are a gap in the ledger; its files are in *.damaged", source)
        reader.close()
        del self._readers[source], self._confirmed[source]

    def _report(self, reader: OutboxReader, error: object) -> None:
        now = time.monotonic()
        if now - self._logged.get(reader.source, -_LOG_S) >= _LOG_S:
            self._logged[reader.source] = now
            log.error("the outbox %s cannot be read: %s", reader.folder, error)

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()
