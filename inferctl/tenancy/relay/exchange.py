"""Passes counters and revoked keys on: from the API processes of this machine to NATS, and back. It keeps nothing."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from inferctl.core.addresses import NatsAddress
from inferctl.tenancy.access import channel
from inferctl.tenancy.fleet import broker
from inferctl.tenancy.fleet.broker import FleetBroker, FleetBrokerError

log = logging.getLogger("inferctl.relay")

_RETRY_S = 1.0
_MAX_UNREAD = 4 << 20  # bytes for an API process that does not read
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_SOCKET_MODE = 0o600
_LOG_S = 60.0


class ExchangeRelay:
    """One relay. `keys_changed` is called when `inferctl keys` changed keys."""

    def __init__(self, folder: Path, url: NatsAddress | str, keys_changed: Callable[[], None]) -> None:
        self._folder, self._url, self._keys_changed = folder, url, keys_changed
        self._servers: dict[asyncio.StreamWriter, str] = {}
        self._subscribed: set[str] = set()
        self._subscribing: set[tuple[str, FleetBroker]] = set()
        self._broker: FleetBroker | None = None
        self._closed = asyncio.Event()  # the connection ended for ever
        self._closing = False
        self._logged: dict[str, float] = {}

    async def run(self) -> None:
        """Pass messages on until this is cancelled. Raises `OSError` if the socket cannot be made."""
        path = channel.address(self._folder)
        listening = await asyncio.start_unix_server(self._serve, path, limit=channel.MAX_LINE)
        try:
            Path(path).chmod(_SOCKET_MODE)
            while True:
                await self._connect()
                await self._closed.wait()
                self._broker = None
                self._subscribed.clear()
                await asyncio.sleep(_RETRY_S)
        finally:
            self._closing = True
            listening.close()
            for writer in self._servers:
                writer.close()
            if self._broker:
                await self._broker.close()

    async def _connect(self) -> None:
        while True:
            connected, closed = None, asyncio.Event()
            try:
                connected = await FleetBroker.connect(
                    self._url,
                    lost=self._report_lost,
                    reconnected=self._ask_again,
                    closed=closed.set,
                    rejected=lambda reason: self._report(f"the broker of limits and keys rejects something: {reason}"),
                )
                await connected.subscribe(broker.KEYS, self._key_message)
                break
            except FleetBrokerError as error:
                if connected:
                    await connected.close()
                self._report(f"{error.message}; each server applies limit / replicas")
                await asyncio.sleep(_RETRY_S)
        self._broker, self._closed = connected, closed
        for name in set(self._servers.values()):
            await self._subscribe(name)
        await self._ask_again()

    async def _report_lost(self) -> None:
        if not self._closing:
            self._report("the broker of limits and keys is lost; each server applies limit / replicas")

    def _report(self, message: str) -> None:
        """Log a message, but the same one not again at once: a broker may end each connection."""
        if (now := time.monotonic()) >= self._logged.get(message, -_LOG_S) + _LOG_S:
            self._logged = {each: at for each, at in self._logged.items() if now < at + _LOG_S} | {message: now}
            log.warning("%s", message)

    async def _ask_again(self) -> None:
        """Let all servers send everything: what they sent without the broker was lost."""
        for name in set(self._servers.values()):
            self._forward(channel.AGAIN, name)
            if self._broker:
                await self._broker.publish(f"{broker.LIMITS}.{name}", channel.AGAIN)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what one API process sends."""
        try:
            name = (await reader.readline()).decode(errors="replace").strip()
            if not _NAME.fullmatch(name):
                return
            self._servers[writer] = name
            await self._subscribe(name)
            while line := await reader.readline():
                if "revoked" in _content(line):
                    continue
                self._forward(line, name, writer)
                if self._broker:
                    await self._broker.publish(f"{broker.LIMITS}.{name}", line)
        except (OSError, ValueError):  # ValueError: a line is too long
            pass
        finally:
            self._servers.pop(writer, None)
            writer.close()

    async def _subscribe(self, name: str) -> None:
        if self._broker and name not in self._subscribed and (name, self._broker) not in self._subscribing:
            connected = self._broker
            self._subscribing.add((name, connected))
            try:
                await connected.subscribe(f"{broker.LIMITS}.{name}", lambda message: self._limit_message(message, name))
                self._subscribed.add(name)
            except FleetBrokerError as error:  # with a new connection, it is tried again
                self._report(error.message)
                await connected.close()
                if self._broker is connected:
                    self._closed.set()
            finally:
                self._subscribing.discard((name, connected))

    def _limit_message(self, message: bytes, name: str) -> None:
        if (content := _content(message)) and "revoked" not in content:
            self._forward(_line(message), name)

    def _key_message(self, message: bytes) -> None:
        if list(_content(message)) == ["revoked"]:
            self._keys_changed()
            for name in set(self._servers.values()):
                self._forward(_line(message), name)

    def _forward(self, line: bytes, name: str, sender: asyncio.StreamWriter | None = None) -> None:
        for writer, each in self._servers.items():
            if each == name and writer is not sender and writer.transport.get_write_buffer_size() < _MAX_UNREAD:
                writer.write(line)


def _content(message: bytes) -> dict[str, Any]:
    """Return what a message says; empty if it is not valid, or longer than a line that servers read."""
    if len(message) >= channel.MAX_LINE:
        return {}
    try:
        found = orjson.loads(message)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _line(message: bytes) -> bytes:
    """Return what came from the broker as one line."""
    return message.replace(b"\n", b" ") + b"\n"
