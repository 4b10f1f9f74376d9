"""The exchange of counters of limits and budgets with other servers, and the news of revoked keys, through the relay.

The relay does what is slow. The event loop of the API process only writes and reads lines, ten times a second, and
goes on alone while there is no relay.
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

from inferctl.config import spec
from inferctl.tenancy.access import channel, clocks, keys
from inferctl.tenancy.access.budgets import Budgets
from inferctl.tenancy.access.clocks import Clocks
from inferctl.tenancy.access.limits import Limiter

log = logging.getLogger("inferctl.access")

_RETRY_S = 0.25
_LOG_S = 30.0
_MAX_UNREAD = 1 << 20  # bytes for a relay that does not read
# A server that starts hears first what others counted, and what they heard of its earlier start.
_LISTEN_S = 2.0
# The names of starts of servers, and ids of keys.
_SERVER, _ID = re.compile("[0-9a-f]{16}"), re.compile(keys.ID)


class Exchange:
    """The side of one API process. `name`: of its servers. `revoke` gets the ids of revoked keys."""

    def __init__(
        self,
        limiter: Limiter,
        folder: Path,
        name: str,
        revoke: Callable[[Iterable[str]], None],
        budgets: Budgets | None = None,
    ) -> None:
        self._limiter, self._folder, self._name, self._revoke = limiter, folder, name, revoke
        self._budgets = budgets or Budgets()
        self._this = secrets.token_hex(8)  # this start of this server
        self._address: str | None = None
        self._clocks = Clocks()
        self._listens_until: float | None = None  # set by the first counters that arrive
        self._reported: dict[str, float] = {}

    @classmethod
    def of(
        cls,
        settings: spec.Access,
        limiter: Limiter,
        name: str,
        revoke: Callable[[Iterable[str]], None],
        budgets: Budgets,
    ) -> Exchange | None:
        """Return that of a server, None if it shares its limits with no others."""
        shares = settings.required and settings.broker
        return cls(limiter, Path(settings.data), name, revoke, budgets) if shares else None

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
        self._budgets.send_all()
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
        changes, further = self._limiter.changes(now), self._limiter.next_counters(now)
        sent_up_to = self._limiter.sent_up_to(now)
        # Without changes, the others learn that there are none.
        found = (
            list(channel.messages(self._this, self._this, changes, sent_up_to, now)) if changes or not further else []
        )
        for server, counters in further.items():
            found += channel.messages(self._this, server or self._this, counters, sent_up_to, now)
        if budgets := self._budgets.message(time.monotonic()):
            found.append(budgets)
        for message in found:
            writer.write(orjson.dumps(message) + b"\n")

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        """Take over what arrives, until the relay ends."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: a line is too long
            while line := await reader.readline():
                started = time.perf_counter()
                try:
                    self._take(orjson.loads(line))
                except Exception as error:  # noqa: BLE001  # one message must not keep the others out
                    kind = type(error).__name__
                    self._report("invalid", f"messages of other servers are not valid, and are ignored: {kind}")
                # Whoever sends many, at least half of the time is left for requests.
                await asyncio.sleep(time.perf_counter() - started)

    def _take(self, message: dict[str, Any]) -> None:
        if "revoked" in message:
            self._revoke([each for each in message["revoked"] if isinstance(each, str) and _ID.fullmatch(each)])
            return
        if "again" in message:
            self._limiter.send_all()
            self._budgets.send_all()
            return
        if "run" in message:
            self._budgets.take(message, time.monotonic())
            return
        now, sender, counted_by, sent = time.time(), message["sender"], message["counted_by"], float(message["sent"])
        clock = float(message.get("clock", sent))
        if not (_SERVER.fullmatch(sender) and _SERVER.fullmatch(counted_by) and math.isfinite(sent + clock)):
            raise ValueError("not a server or a time")
        counters = channel.counters(message)
        if sender == self._this:  # this server does not hear itself
            return
        ahead = self._clocks.ahead(sender, clock, now)
        if ahead > clocks.TOLERANCE_S:
            self._report("clock", f"the clock of another server is {ahead:.1f} s ahead of this one; synchronize them")
        # What others say of a server that sends its own counters could be in other cells, and count once more.
        if counted_by == sender or not (counted_by == self._this or self._clocks.sends(counted_by, now)):
            self._limiter.merge(counted_by, clocks.in_own_time(counters, ahead), now)
        if not self._listens():
            # What is behind may be messages that are late. Then this server is more careful than it has to be.
            self._limiter.heard(sender, sent - max(0.0, ahead), now)

    def _listens(self) -> bool:
        """Return whether this server started just now. Until it has heard the others, all of them count as silent."""
        now = time.monotonic()
        if self._listens_until is None:
            self._listens_until = now + _LISTEN_S
        return now < self._listens_until

    def _report(self, kind: str, message: str) -> None:
        """Log a message, but not each one of many."""
        if (now := time.monotonic()) >= self._reported.get(kind, -math.inf) + _LOG_S:
            self._reported[kind] = now
            log.warning("%s", message)


async def follow_ledger(budgets: Budgets) -> None:
    """Take over what the ledger has of budgets, until this is cancelled."""
    while True:
        try:
            budgets.read_totals(time.time())
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("what the ledger has of budgets cannot be read: %s", error)
            await asyncio.sleep(_LOG_S)
        await asyncio.sleep(_RETRY_S)
