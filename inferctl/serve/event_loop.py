"""The event loop of a process that serves, and the garbage collector under its load."""

from __future__ import annotations

import asyncio
import contextlib
import gc


def runner() -> asyncio.Runner:
    """Return a runner with uvloop, or without it where it is not installed."""
    loop_factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        loop_factory = uvloop.new_event_loop
    return asyncio.Runner(loop_factory=loop_factory)


def freeze_garbage() -> None:
    """Leave what the start created to the end of the process, and look for garbage less often."""
    gc.collect()
    gc.freeze()
    # By default, 700 new objects start a collection, which is more often than once per batch.
    gc.set_threshold(50_000, 20, 100)
