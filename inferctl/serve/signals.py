"""SIGINT and SIGTERM, which stop a server."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

EXIT_TERMINATED = 128 + signal.SIGTERM


class StopSignals:
    """Collects SIGINT and SIGTERM, so that they never raise an exception.

    An exception can interrupt the start of a thread at any point. Python then waits for that thread forever at exit.
    """

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._deliver: Callable[[int], object] = self._pending.append

    def __enter__(self) -> StopSignals:
        self._previous = {
            number: signal.signal(number, lambda number, _: self._deliver(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def connect(self, stop: Callable[[int], None]) -> None:
        """Call `stop` on the running event loop with each signal, first with those that arrived before."""
        loop = asyncio.get_running_loop()
        self._deliver = lambda number: loop.call_soon_threadsafe(stop, number)
        for number in self._pending:
            stop(number)

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if a signal arrived. For a start that holds nothing yet that has to be ended."""
        if self._pending:
            raise KeyboardInterrupt
