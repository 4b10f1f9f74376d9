"""The relay of a server: `python -m inferctl.tenancy.relay`, started by `inferctl serve`.

The first line of stdin is the spec as JSON. At the end of stdin, also if the server was killed, the relay stores what
is left, and ends. Another line before it says that the server recorded all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from inferctl.core import streams
from inferctl.core.errors import InferctlError

_NICENESS = 10  # the server and its engine go first
_RELEASE_S = 2.0  # the API processes of a killed server write their last events, and release their outboxes


def main() -> int:
    """Work until the end of stdin, and return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server gets them, and decides
    os.nice(_NICENESS)
    _set_group_niceness(_NICENESS)
    streams.guard()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    with os.fdopen(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:  # leaves what follows for `_follow`
        line = stdin.readline()
    if not line:
        return 0
    ended: Future[None] = Future()
    threading.Thread(target=_follow, args=(ended,), daemon=True).start()  # before the imports, which take a second
    from inferctl.config.spec import Spec
    from inferctl.tenancy.relay.relay import Relay

    spec = Spec.model_validate(json.loads(line)["spec"])

    async def run() -> None:
        metering = None if spec.metering.mode == "off" else spec.metering
        relay, loop = Relay(metering, spec.access), asyncio.get_running_loop()

        def end(_: Future[None]) -> None:
            # Even if a thread waits for a database that does not respond.
            timer = threading.Timer(spec.serve.drain_seconds + 5, os._exit, (1,))
            timer.daemon = True
            timer.start()
            loop.call_soon_threadsafe(relay.end)

        ended.add_done_callback(end)
        await relay.run()

    try:
        asyncio.run(run())
    except (InferctlError, OSError) as error:
        logging.getLogger("inferctl.relay").error("%s", getattr(error, "message", error))
        return getattr(error, "exit_code", 1)
    return 0


def _follow(ended: Future[None]) -> None:
    """Complete `ended` after the end of stdin. Before that, a server that was not killed sends something."""
    said = False
    while os.read(sys.stdin.fileno(), 4096):  # without Python's buffer, whose lock would break an early exit
        said = True
    # The server needs no priority any more. Beside four busy processes on two cores, the niceness took 15 s.
    _set_group_niceness(0)
    if not said:
        time.sleep(_RELEASE_S)
    ended.set_result(None)


def _set_group_niceness(niceness: int) -> None:
    """Set the niceness of this session.

    Linux schedules each session as one group (autogroup), in which the niceness of its processes counts. This process
    has a session of its own, so the group needs a niceness too.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(niceness))


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # without waiting for a thread that reads stdin
