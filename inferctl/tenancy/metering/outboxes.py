"""All outboxes of a data folder, as the relay sees them."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from inferctl.tenancy.metering import outbox
from inferctl.tenancy.metering.outbox import EventBatch, Outbox, OutboxReader

log = logging.getLogger("inferctl.metering")


class Outboxes:
    """Reads the outboxes in `data`, and takes over those of processes that ended."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._readers: dict[str, OutboxReader] = {}
        self._adopted: dict[str, Outbox] = {}
        self._confirmed: dict[str, int] = {}

    @property
    def sources(self) -> list[str]:
        """The sources of the events, as of the last `refresh`."""
        return list(self._readers)

    def refresh(self) -> None:
        """Find new outboxes, and write the event of the end into those whose process ended without it."""
        known = {reader.folder for reader in self._readers.values()}
        for folder in outbox.folders(self._data):
            if folder not in known:
                reader = OutboxReader(folder)
                self._readers[reader.source] = reader
        for source, reader in self._readers.items():
            if source not in self._adopted and (adopted := Outbox.adopt(reader.folder)):
                self._adopt(source, adopted)

    def _adopt(self, source: str, adopted: Outbox) -> None:
        try:
            adopted.end(clean=False)
        except sqlite3.Error as error:
            adopted.close()  # the next `refresh` tries again
            log.error("the outbox of a server process that ended cannot be read: %s: %s", source, error)
        else:
            adopted.disconnect()
            self._adopted[source] = adopted

    def read(self, source: str, after: int, limit: int) -> list[EventBatch]:
        """Return up to `limit` batches with numbers above `after`; none if the outbox cannot be read now."""
        try:
            return self._readers[source].read(after, limit)
        except sqlite3.Error as error:
            self._readers[source].close()
            log.warning("the outbox %s cannot be read: %s", source, error)
            return []

    def confirmed(self, source: str) -> int:
        """Return the last watermark that `confirm` wrote, in this or an earlier process."""
        if source not in self._confirmed:
            self._confirmed[source] = outbox.read_watermark(self._readers[source].folder)
        return self._confirmed[source]

    def confirm(self, source: str, watermark: int) -> None:
        """Let the server process free its events up to `watermark`. Remove the outbox of an ended one without others.

        Raises `OSError`.
        """
        reader = self._readers[source]
        if self.confirmed(source) != watermark:
            outbox.write_watermark(reader.folder, watermark)
            self._confirmed[source] = watermark
        if source in self._adopted and not self.read(source, watermark, 1):
            reader.close()
            self._adopted.pop(source).remove()
            del self._readers[source], self._confirmed[source]

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()
        for adopted in self._adopted.values():
            adopted.close()
