"""Vectors that several servers share in a Valkey server, which may be slow, full or gone at any time.

Requests only ever use a connection that is known to work: a background task connects, and after three failures in a
row, no request asks until a probe of that task succeeds. So a request loses about the timeout.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from inferctl.core.addresses import ValkeyAddress
from inferctl.core.errors import NotReadyError, UsageError, install_hint

if TYPE_CHECKING:
    from valkey.asyncio import Valkey

log = logging.getLogger("inferctl.cache")

_TIMEOUT_S = 0.002
_MAX_FAILURES = 3
_PROBE_EVERY_S = 1.0
_BACKGROUND_TIMEOUT_S = 1.0
# At most this much is read per request and written per command, so that the timeout suffices.
_COMMAND_BYTES = 256 * 1024
# Vectors that wait to be written. Beyond it, the oldest are dropped: they are only not shared.
_MAX_WAITING_BYTES = 16 * 1024 * 1024
_MAX_CONNECTIONS = 32
# Iterations of the event loop in which a response that is already there is read. The loop may have been busy for longer
# than the timeout, and that is no failure of the other server.
_GRACE_ITERATIONS = 4
# A change of the format needs another prefix.
_PREFIX = b"inferctl:vector:1:"


class SharedLevel:
    """Vectors by key in a Valkey server. `up`: whether requests ask it. `on_failure` is called for each failed call."""

    def __init__(self, address: ValkeyAddress | str, on_failure: Callable[[], None] = lambda: None) -> None:
        """Raises `UsageError` for a bad URL, `NotReadyError` if the client library is not installed."""
        try:
            from valkey.asyncio import Valkey
            from valkey.exceptions import ValkeyError
        except ModuleNotFoundError as error:
            raise NotReadyError(
                f"cache.shared requires the package {error.name}, not installed", install_hint("cache")
            ) from None

        self.up, self.vector_bytes = False, 0
        self._on_failure, self._warned = on_failure, False
        self._errors = (ValkeyError, OSError, TimeoutError)
        self._in_a_row = self._asking = 0
        self._waiting: deque[tuple[bytes, bytes]] = deque()
        self._waiting_bytes = 0
        self._wake: asyncio.Event | None = None

        url = ValkeyAddress(address).secret()

        def client(connections: int) -> Valkey:
            names: dict[str, Any] = {"lib_name": None, "lib_version": None}  # two round trips fewer to connect
            made: Valkey = Valkey.from_url(url, max_connections=connections, socket_connect_timeout=1.0, **names)
            return made

        try:
            self._reader, self._writer = client(_MAX_CONNECTIONS), client(1)
        except ValueError:
            message = f"the address of cache.shared is not valid: {ValkeyAddress(address)}"
            raise UsageError(message, "check the numbers in its query") from None

    async def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the stored vectors of `keys`, nothing after the timeout. Of many keys, only the first are asked."""
        if self._asking >= _MAX_CONNECTIONS:
            return {}
        keys = keys[: max(1, _COMMAND_BYTES // self.vector_bytes)]
        self._asking += 1
        task = asyncio.ensure_future(self._reader.mget([_PREFIX + key for key in keys]))
        try:
            await asyncio.wait((task,), timeout=_TIMEOUT_S)
            for _ in range(_GRACE_ITERATIONS):
                if not task.done():
                    await asyncio.sleep(0)
        finally:
            self._asking -= 1
            if not task.done():
                task.cancel()
        if not task.done():  # it is only being cancelled
            self._failed("did not respond in time")
            return {}
        if error := task.exception():
            if not isinstance(error, self._errors):
                raise error
            self._failed(type(error).__name__)
            return {}
        self._in_a_row = 0
        # A value of another size is not a vector of this model.
        return {
            key: value
            for key, value in zip(keys, task.result(), strict=True)
            if value is not None and len(value) == self.vector_bytes
        }

    def put(self, vectors: dict[bytes, bytes]) -> None:
        """Write vectors later."""
        for key, vector in vectors.items():
            self._waiting.append((key, vector))
            self._waiting_bytes += len(vector)
        while self._waiting_bytes > _MAX_WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft()[1])
        if self._wake:
            self._wake.set()

    async def run(self) -> None:
        """Connect, write and probe, until cancelled."""
        self._wake = asyncio.Event()
        try:
            while True:
                if not self.up:
                    await self._probe()
                elif self._waiting:
                    await self._write()
                else:
                    self._wake.clear()
                    await self._wake.wait()
        finally:
            self.up = False
            await self._reader.aclose()
            await self._writer.aclose()

    async def _probe(self) -> None:
        try:
            async with asyncio.timeout(_BACKGROUND_TIMEOUT_S):
                await self._writer.ping()
                # Also the connection that the first request will use.
                await self._reader.ping()
        except self._errors as error:
            if not self._warned:
                self._warned = True
                log.warning("cache.shared: no connection to the Valkey server (%s)", type(error).__name__)
            self._on_failure()
            await asyncio.sleep(_PROBE_EVERY_S)
            return
        self.up, self._in_a_row, self._warned = True, 0, False
        log.info("cache.shared: connected")

    async def _write(self) -> None:
        batch: dict[bytes, bytes] = {}
        size = 0
        while self._waiting and (not batch or size + len(self._waiting[0][1]) <= _COMMAND_BYTES):
            key, vector = self._waiting.popleft()
            batch[_PREFIX + key] = vector
            size += len(vector)
        self._waiting_bytes -= size
        try:
            async with asyncio.timeout(_BACKGROUND_TIMEOUT_S):
                await self._writer.mset(batch)
        except self._errors as error:
            self._failed(type(error).__name__)

    def _failed(self, reason: str) -> None:
        self._on_failure()
        self._in_a_row += 1
        if self.up and self._in_a_row >= _MAX_FAILURES:
            self.up, self._warned = False, True
            log.warning("cache.shared: the Valkey server failed %d times (%s)", self._in_a_row, reason)
            if self._wake:
                self._wake.set()
