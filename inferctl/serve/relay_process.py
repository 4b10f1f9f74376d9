"""Starts `python -m inferctl.tenancy.relay`, which does what no request may wait for, and restarts it if it ends.

It brings usage events to the ledger, copies the key store, and exchanges limits and revoked keys with other servers.

The relay may crash or hang at any time: the server writes its events to the outbox and never waits for the relay. It
gets the spec as a line of JSON on stdin. The end of stdin tells it to store what is left and to end. An empty line
before it says that this server has recorded all its events; without it, the server was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable

from inferctl.config.spec import Spec
from inferctl.core.addresses import WITH_SECRETS
from inferctl.core.errors import install_hint

log = logging.getLogger("inferctl.relay")

_MIN_PAUSE_S, _MAX_PAUSE_S = 0.25, 30.0
_STABLE_S = 30.0  # after this, the next crash is a new one


def start(spec: Spec, notify: Callable[[str], None]) -> RelayProcess | None:
    """Return the relay of a server, None if it needs none. Its `run` starts it.

    `notify` gets the reason if the packages of the relay are not installed, as in images.
    """
    metering, access = spec.metering.mode != "off", spec.access.has_relay
    if not metering and not access:
        return None
    packages = {"sqlalchemy": "ledger", "alembic": "ledger"}
    if (metering and spec.metering.broker) or (access and spec.access.broker):
        packages["nats"] = "broker"
    missing = [name for name in ("inferctl.tenancy.relay", *packages) if importlib.util.find_spec(name) is None]
    if missing:
        hint = "" if missing[0] == "inferctl.tenancy.relay" else f" ({install_hint(packages[missing[0]])})"
        waiting = [f"usage events stay in {spec.metering.data}"] if metering else []
        if access:
            waiting.append(f"keys and limits of other servers do not arrive in {spec.access.data}")
        what, options = " and ".join(waiting), f" --data {spec.metering.data}" if metering else ""
        notify(
            f"{what}, because the packages of the relay are missing{hint}; run `inferctl relay{options}` where they are"
        )
        return None
    return RelayProcess(spec)


class RelayProcess:
    """One relay, started again with growing pauses."""

    def __init__(self, spec: Spec) -> None:
        self._line = json.dumps({"spec": spec.model_dump(mode="json", context=WITH_SECRETS)}).encode() + b"\n"
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._failures = 0

    async def run(self) -> None:
        """Keep the relay running until `stop`."""
        while not self._stopping.is_set():
            started = time.monotonic()
            how = await self._run_process()
            if self._stopping.is_set():
                return
            self._failures = 0 if time.monotonic() - started > _STABLE_S else self._failures + 1
            pause = min(_MIN_PAUSE_S * 2 ** min(self._failures, 10), _MAX_PAUSE_S)
            log.error("the relay %s; starting it again in %.2g s", how, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def stop(self, seconds: float) -> None:
        """Let the relay store what is left, and end it after `seconds` at the latest."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        _end(process)
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            log.warning("the relay did not store all usage events; the next one in this folder does")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _run_process(self) -> str:
        """Run the relay until it ends, and return how it ended."""
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "inferctl.tenancy.relay",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in a terminal is for the server only
            )
        except OSError as error:
            return f"cannot be started: {error}"
        assert process.stdin and process.stderr
        process.stdin.write(self._line)
        if self._stopping.is_set():
            _end(process)
        with contextlib.suppress(ConnectionError, ValueError):  # a line that is too long
            async for line in process.stderr:
                log.warning("%s", line.decode(errors="replace").rstrip())
        code = await process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin
    process.stdin.write(b"\n")
    process.stdin.close()
