"""What a server shows while it starts: the phase, and the seconds that passed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TypeAlias

# Shows a phase on a terminal, with the seconds, until the context ends. The function in it changes the phase.
Spinner: TypeAlias = Callable[[str], AbstractContextManager[Callable[[str], None]]]

_INTERVAL_S = 15.0


class StartProgress:
    """The phase of a start. Without a `spinner`, `notify` gets a line at the first phase, and one every 15 s."""

    def __init__(self, notify: Callable[[str], None], spinner: Spinner | None = None) -> None:
        self._notify, self._spinner = notify, spinner
        self._phase: str | None = None
        self._show: Callable[[str], None] | None = None
        self._stack = ExitStack()
        self._started = self._printed = time.monotonic()
        self._stopped = False

    def phase(self, text: str) -> None:
        """Say what the start does now."""
        if self._stopped:  # an engine that is started again
            return
        first, self._phase = self._phase is None, text
        if self._show:
            self._show(text)
        elif self._spinner:
            self._show = self._stack.enter_context(self._spinner(text))
        elif first:
            self._notify(f"starting   {text}")

    def tick(self) -> None:
        """Print the line of a phase that is due."""
        now = time.monotonic()
        if self._phase and not self._stopped and not self._spinner and now - self._printed >= _INTERVAL_S:
            self._printed = now
            self._notify(f"starting   {self._phase}; {now - self._started:.0f} s so far")

    async def run(self) -> None:
        """Call `tick` until `stop`."""
        while not self._stopped:
            self.tick()
            await asyncio.sleep(1)

    def stop(self) -> None:
        """Show nothing any more. A terminal has its cursor again."""
        self._stopped = True
        self._stack.close()
