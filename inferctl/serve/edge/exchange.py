"""The exchange of limit counters with other servers, and the news of revoked keys, through the worker.

The worker does what is slow. The event loop of the API process only writes and reads lines, ten times a second, and
goes on alone while there is no worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from inferctl.access import channel, keys
from inferctl.access.limits import Limiter

log = logging.getLogger("inferctl.access")

_RETRY_S = 0.25
_LOG_S = 30.0
_MAX_UNREAD = 1 << 20  # bytes for a worker that does not read
# The names of starts of servers, and ids of keys.
_SERVER, _ID = re.compile("[0-9a-f]{16}"), re.compile(keys.ID)


class Exchange:
    """The side of one API process. `name`: of its servers. `revoke` gets the ids of revoked keys."""

    def __init__(self, limiter: Limiter, folder: Path, name: str, revoke: Callable[[Iterable[str]], None]) -> None:
        self._limiter, self._folder, self._name, self._revoke = limiter, folder, name, revoke
        self._this = secrets.token_hex(8)  # this start of this server
        self._address: str | None = None
        self._reported = -math.inf

    async def run(self) -> None:
        """Exchange counters until this is cancelled."""
        while True:
            self._limiter.update(time.time())
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
                self._limiter.update(time.time())
                if writer.transport.get_write_buffer_size() < _MAX_UNREAD:
                    self._send(writer)
                await asyncio.wait((receiving,), timeout=channel.INTERVAL_S)
        finally:
            receiving.cancel()

    def _send(self, writer: asyncio.StreamWriter) -> None:
        now = time.time()
        changes, rest = self._limiter.changes(now), self._limiter.rest(now)
        told = self._limiter.told(now)
        found = list(channel.messages(self._this, self._this, changes, told))
        for server, counters in rest.items():
            found += channel.messages(self._this, server or self._this, counters, told)
        # Without changes, the others learn that there are none.
        for message in found or [{"sender": self._this, "sent": told, "counted_by": self._this, "counters": {}}]:
            writer.write(orjson.dumps(message) + b"\n")

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        """Take over what arrives, until the worker ends."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: a line is too long
            while line := await reader.readline():
                started = time.perf_counter()
                try:
                    self._take(orjson.loads(line))
                except Exception as error:  # noqa: BLE001  # one message must not keep the others out
                    self._report(error)
                # Whoever sends many, at least half of the time is left for requests.
                await asyncio.sleep(time.perf_counter() - started)

    def _take(self, message: dict[str, Any]) -> None:
        if "revoked" in message:
            self._revoke([each for each in message["revoked"] if isinstance(each, str) and _ID.fullmatch(each)])
            return
        if "again" in message:
            self._limiter.send_all()
            return
        now, sender, counted_by, sent = time.time(), message["sender"], message["counted_by"], float(message["sent"])
        if not (_SERVER.fullmatch(sender) and _SERVER.fullmatch(counted_by) and math.isfinite(sent)):
            raise ValueError("not a server or a time")
        counters = channel.counters(message)
        if sender == self._this:  # this server does not hear itself
            return
        if counted_by != self._this:
            self._limiter.merge(counted_by, counters, now)
        self._limiter.heard(sender, sent, now)

    def _report(self, error: Exception) -> None:
        """Log that a message was not valid, but not each one of many."""
        if (now := time.monotonic()) >= self._reported + _LOG_S:
            self._reported = now
            log.warning("messages of other servers are not valid, and are ignored: %s", type(error).__name__)
