"""The limits of the keys on one server, and their exchange with other servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from inferctl.config import spec
from inferctl.serve.edge.exchange import Exchange
from inferctl.serve.edge.request_context import RequestContext
from inferctl.tenancy.access.key_file import ApiKey
from inferctl.tenancy.access.limits import Charge, Limiter


class KeyLimits:
    """What the keys used. `name`: of the server. `revoke` gets the ids of keys that other servers saw revoked."""

    def __init__(self, settings: spec.Access, name: str, revoke: Callable[[Iterable[str]], None]) -> None:
        limits = settings.requests_per_minute, settings.tokens_per_minute
        self._limiter = Limiter(*limits, settings.replicas, exchanges=settings.broker is not None)
        self._exchange = Exchange(self._limiter, Path(settings.data), name, revoke) if settings.broker else None

    def charge(self, key: ApiKey, context: RequestContext) -> None:
        """Charge one request, and set `charge` and `usage` of its context. Raises `LimitError`."""
        now = time.time()
        context.usage = self._limiter.usage(key, now)
        if context.usage is not None:
            context.charge = Charge(context.usage, now)

    async def exchange(self) -> None:
        """Share limits with other servers, and hear of revoked keys, until this is cancelled."""
        if self._exchange:
            await self._exchange.run()
