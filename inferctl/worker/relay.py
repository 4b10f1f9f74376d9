"""Passes counters and revoked keys on: from the API processes of this machine to NATS, and back. It keeps nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable
from pathlib import Path

from inferctl.access import channel
from inferctl.fleet import broker
from inferctl.fleet.broker import Broker, BrokerUnavailableError

log = logging.getLogger("inferctl.worker")

_RETRY_S = 1.0
_MAX_UNREAD = 4 << 20  # bytes for an API process that does not read
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_SOCKET_MODE = 0o660


class Relay:
    """One relay. `keys_changed` is called when `inferctl keys` changed keys."""

    def __init__(self, folder: Path, url: str, keys_changed: Callable[[], None]) -> None:
        self._folder, self._url, self._keys_changed = folder, url, keys_changed
        self._servers: dict[asyncio.StreamWriter, str] = {}
        self._subscribed: set[str] = set()
        self._broker: Broker | None = None
        self._closing = False

    async def run(self) -> None:
        """Pass messages on until this is cancelled. Raises `OSError` if the socket cannot be made."""
        path = channel.address(self._folder)
        listening = await asyncio.start_unix_server(self._serve, path, limit=channel.MAX_LINE)
        try:
            Path(path).chmod(_SOCKET_MODE)
            await self._connect()
            await asyncio.get_running_loop().create_future()
        finally:
            self._closing = True
            listening.close()
            for writer in self._servers:
                writer.close()
            if self._broker:
                await self._broker.close()

    async def _connect(self) -> None:
        reported = False
        while True:
            try:
                connected = await Broker.connect(self._url, lost=self._report_lost, reconnected=self._ask_again)
                await connected.subscribe(broker.KEYS, self._key_message)
                break
            except BrokerUnavailableError as error:
                if not reported:
                    log.warning("%s; each server applies limit / replicas", error.message)
                reported = True
                await asyncio.sleep(_RETRY_S)
        self._broker = connected
        for name in set(self._servers.values()):
            await self._subscribe(name)
        await self._ask_again()

    async def _report_lost(self) -> None:
        if not self._closing:
            log.warning("the broker of limits and keys is lost; each server applies limit / replicas")

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
                self._forward(line, name, writer)
                if self._broker:
                    await self._broker.publish(f"{broker.LIMITS}.{name}", line)
        except (OSError, ValueError):  # ValueError: a line is too long
            pass
        finally:
            self._servers.pop(writer, None)
            writer.close()

    async def _subscribe(self, name: str) -> None:
        if self._broker and name not in self._subscribed:
            self._subscribed.add(name)
            with contextlib.suppress(BrokerUnavailableError):
                await self._broker.subscribe(
                    f"{broker.LIMITS}.{name}", lambda message: self._forward(_line(message), name)
                )

    def _key_message(self, message: bytes) -> None:
        self._keys_changed()
        for name in set(self._servers.values()):
            self._forward(_line(message), name)

    def _forward(self, line: bytes, name: str, sender: asyncio.StreamWriter | None = None) -> None:
        for writer, each in self._servers.items():
            if each == name and writer is not sender and writer.transport.get_write_buffer_size() < _MAX_UNREAD:
                writer.write(line)


def _line(message: bytes) -> bytes:
    """Return what came from the broker as one line."""
    return message.replace(b"\n", b" ") + b"\n"
