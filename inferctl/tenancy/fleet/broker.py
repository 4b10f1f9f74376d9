"""NATS between the machines of a fleet: counters of limits, and changes of keys.

Nothing that it has needs to last: counters are sent again, and keys are read again. So a lost message only delays them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from inferctl.core.addresses import NatsAddress
from inferctl.core.errors import NotReadyError
from inferctl.tenancy import broker as brokers

# Of the counters of servers with one name; and of changed keys.
LIMITS, KEYS = "inferctl.limits", "inferctl.keys"


class FleetBrokerError(NotReadyError):
    """The broker does not respond. The same call may succeed later."""


class FleetBroker:
    """A connection, which is made again whenever it breaks."""

    def __init__(self, connection: Any) -> None:
        self._nats = connection

    @classmethod
    async def connect(
        cls,
        address: NatsAddress | str,
        timeout_s: float = brokers.TIMEOUT_S,
        *,
        lost: Callable[[], Awaitable[None]] | None = None,
        reconnected: Callable[[], Awaitable[None]] | None = None,
        closed: Callable[[], None] | None = None,
        rejected: Callable[[str], None] | None = None,
    ) -> FleetBroker:
        """Connect to NATS. `lost`, `reconnected`: called when the connection breaks, and when it is made again.

        `closed`: called when it ended for ever, as after some errors of the broker. `rejected`: gets the reason if the
        broker does not let this client publish or subscribe. Raises `FleetBrokerError`.
        """
        url = NatsAddress(address)

        async def failed(error: Exception) -> None:
            # Other errors are about the connection, of which `lost` and `closed` tell.
            if rejected and "permissions violation" in str(error).lower():
                rejected(str(error))

        async def ended() -> None:
            if closed:
                closed()

        try:
            connection = await brokers.connect(
                url,
                timeout_s,
                failed,
                max_reconnect_attempts=-1,
                no_echo=True,
                disconnected_cb=lost,
                reconnected_cb=reconnected,
                closed_cb=ended,
            )
            return cls(connection)
        except brokers.ERRORS as error:
            message = f"the broker of limits and keys {url} is not available: {brokers.reason(error)}"
            raise FleetBrokerError(message, "check access.broker") from None

    async def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(*brokers.ERRORS):
            await self._nats.close()

    async def publish(self, subject: str, message: bytes) -> None:
        """Send a message to all others that subscribe. Without a connection, it is lost: it would be outdated."""
        if self._nats.is_connected:
            with contextlib.suppress(*brokers.ERRORS):
                await self._nats.publish(subject, message)

    async def subscribe(self, subject: str, receive: Callable[[bytes], None]) -> None:
        """Call `receive` with each message, from now on. Raises `FleetBrokerError`."""

        async def received(message: Any) -> None:
            receive(message.data)

        try:
            await self._nats.subscribe(subject, cb=received)
        except brokers.ERRORS as error:
            raise FleetBrokerError(f"the broker rejects {subject}: {error}", "check access.broker") from None

    async def flush(self, timeout_s: float) -> None:
        """Return when the broker has all messages. Raises `FleetBrokerError`."""
        try:
            await self._nats.flush(timeout_s)
        except brokers.ERRORS as error:
            raise FleetBrokerError(f"the broker does not respond: {error}", "check access.broker") from None


async def publish_change(url: NatsAddress | str, revoked: list[str], timeout_s: float) -> None:
    """Tell all relays that keys changed, and the ids of those that were revoked. Raises `FleetBrokerError`."""
    broker = await FleetBroker.connect(url, timeout_s)
    try:
        await broker.publish(KEYS, json.dumps({"revoked": revoked}).encode())
        await broker.flush(timeout_s)
    finally:
        await broker.close()
