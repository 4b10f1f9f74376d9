"""Connections to NATS: for usage events, and for keys and limits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import nats
import nats.errors
import nats.js.errors

from inferctl.core.addresses import NatsAddress

TIMEOUT_S = 5.0
_PING_S = 2  # a broker that misses two of these is gone
ERRORS = (nats.errors.Error, nats.js.errors.Error, OSError, asyncio.TimeoutError)


async def connect(
    url: NatsAddress, timeout_s: float, failed: Callable[[Exception], Awaitable[None]] | None = None, **options: Any
) -> Any:
    """Connect within `timeout_s`, also if the client would try for ever. Raises one of `ERRORS`.

    `failed`: called with each error of the connection. `options`: of the client.
    """
    reasons: list[Exception] = []

    async def note(error: Exception) -> None:
        reasons[:] = [error]
        if failed:
            await failed(error)

    connecting = nats.connect(
        url.public,
        **url.credentials(),
        connect_timeout=timeout_s,
        reconnect_time_wait=0.25,
        ping_interval=_PING_S,
        max_outstanding_pings=2,
        error_cb=note,
        **options,
    )
    try:
        return await asyncio.wait_for(connecting, timeout_s)
    except ERRORS as error:
        # The time that it may take says less than what failed meanwhile.
        raise (reasons[-1] if reasons and isinstance(error, TimeoutError) else error) from None


def reason(error: Exception) -> str:
    """Return one line about an error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
