"""The exchange of limit counters with other servers, and the news of revoked keys, through the worker.

The worker does what is slow. The event loop of the API process only writes and reads lines, ten times a second, and
goes on alone while there is no worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from inferctl.access import channel
from inferctl.access.limits import Limiter

log = logging.getLogger("inferctl.access")

_RETRY_S = 0.25
_MAX_UNREAD = 1 << 20  # bytes for a worker that does not read


class Exchange:
    """The side of one API process. `name`: of its servers. `revoke` gets the ids of revoked keys."""

    def __init__(self, limiter: Limiter, folder: Path, name: str, revoke: Callable[[Iterable[str]], None]) -> None:
        self._limiter, self._folder, self._name, self._revoke = limiter, folder, name, revoke
        self._this = secrets.token_hex(8)  # this start of this server
        self._address: str | None = None

    async def run(self) -> None:
        """Exchange counters until this is cancelled."""
        while True:
            with contextlib.suppress(OSError):
                self._address = self._address or channel.address(self._folder)
                reader, writer = await asyncio.open_unix_connection(self._address, limit=channel.MAX_LINE)
                try:
                    await self._exchange(reader, writer)
                finally:
                    writer.close()
            await asyncio.sleep(_RETRY_S)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{self._name}\n".encode() + channel.AGAIN)
        self._limiter.send_all()
        receiving = asyncio.create_task(self._receive(reader))
        try:
            while not receiving.done():
                if writer.transport.get_write_buffer_size() < _MAX_UNREAD:
                    self._send(writer)
                await asyncio.wait((receiving,), timeout=channel.INTERVAL_S)
        finally:
            receiving.cancel()

    def _send(self, writer: asyncio.StreamWriter) -> None:
        now = time.time()
        changes, rest = self._limiter.changes(now), self._limiter.rest(now)
        found = list(channel.messages(self._this, self._this, changes, now))
        for server, counters in rest.items():
            found += channel.messages(self._this, server or self._this, counters, now)
        # Without changes, the others learn that there are none.
        for message in found or [{"sender": self._this, "sent": now, "counted_by": self._this, "counters": {}}]:
            writer.write(orjson.dumps(message) + b"\n")

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        """Take over what arrives, until the worker ends."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: a line is too long
            while line := await reader.readline():
                try:
                    self._take(orjson.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    log.warning("a message of another server is not valid: %s", type(error).__name__)

    def _take(self, message: dict[str, Any]) -> None:
        if "revoked" in message:
            self._revoke([each for each in message["revoked"] if isinstance(each, str)])
            return
        if "again" in message:
            self._limiter.send_all()
            return
        now, counted_by, sent = time.time(), message["counted_by"], float(message["sent"])
        if counted_by != self._this:
            self._limiter.merge(counted_by, channel.counters(message), now)
        self._limiter.heard(message["sender"], sent, now)
