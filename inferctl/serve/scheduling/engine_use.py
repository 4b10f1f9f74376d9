"""What engines computed for one request, also after its client disconnected."""

from __future__ import annotations

import asyncio


class EngineUse:
    """`tokens` and `seconds` of the batches that completed so far: each batch's time is shared by tokens.

    A batch that an engine has goes on when the request is cancelled, so both grow while something is `pending`.
    """

    __slots__ = ("_settled", "pending", "seconds", "tokens")

    def __init__(self) -> None:
        self.tokens, self.seconds, self.pending = 0, 0.0, 0
        self._settled: asyncio.Future[None] | None = None

    def add(self, tokens: int, seconds: float) -> None:
        """Count a sequence that an engine computed."""
        self.tokens += tokens
        self.seconds += seconds

    def begin(self) -> None:
        """Note that engines may compute something more, until `end` is called as often as this."""
        self.pending += 1

    def end(self) -> None:
        """Take back one `begin`."""
        self.pending -= 1
        if not self.pending and self._settled is not None and not self._settled.done():
            self._settled.set_result(None)

    def settled(self) -> asyncio.Future[None]:
        """Return a future that is done when engines compute nothing more for the request."""
        if self._settled is None or self._settled.done():
            self._settled = asyncio.get_running_loop().create_future()
            if not self.pending:
                self._settled.set_result(None)
        return self._settled
