"""What engines computed for one request, also after its client disconnected."""

from __future__ import annotations

import asyncio


class EngineUse:
    """`tokens` and `seconds` of the batches that completed so far: each batch's time is shared by tokens.

    A batch that an engine has goes on when the request is cancelled, so both grow until `settled` returns.
    """

    __slots__ = ("_pending", "_settled", "seconds", "tokens")

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._pending = 0
        self._settled: asyncio.Future[None] | None = None

    def add(self, tokens: int, seconds: float) -> None:
        """Count a sequence that an engine computed."""
        self.tokens += tokens
        self.seconds += seconds

    def begin(self) -> None:
        """Note that engines may compute something more, until `end` is called as often as this."""
        self._pending += 1

    def end(self, _: object = None) -> None:
        """Take back one `begin`. It can be the callback of a future."""
        self._pending -= 1
        if not self._pending and self._settled is not None and not self._settled.done():
            self._settled.set_result(None)

    async def settled(self) -> None:
        """Return when engines compute nothing more for the request. One task can wait at a time."""
        while self._pending:
            self._settled = asyncio.get_running_loop().create_future()
            await self._settled
