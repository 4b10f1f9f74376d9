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
from collections.abc import Callable

from inferctl.config.spec import Spec
from inferctl.core.addresses import WITH_SECRETS
from inferctl.core.errors import install_hint
from inferctl.serve.child import Child

log = logging.getLogger("inferctl.relay")

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


class RelayProcess(Child):
    """One relay, started again with growing pauses."""

    name = "the relay"
    restartable = True

    def __init__(self, spec: Spec) -> None:
        super().__init__(log.error)
        self._line = json.dumps({"spec": spec.model_dump(mode="json", context=WITH_SECRETS)}).encode() + b"\n"

    def stop(self, seconds: float) -> None:
        """Let the relay store what is left, and `run` return after `seconds` at the latest."""
        self.stopping.set()
        self._end()
        self.expect(seconds, what="store all usage events, which the next one in this folder does,")

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "inferctl.tenancy.relay",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for the server only
        )

    async def _attend(self) -> None:
        process = self._process
        assert process and process.stdin and process.stderr
        process.stdin.write(self._line)
        if self.stopping.is_set():
            self._end()
        stable = asyncio.get_running_loop().call_later(_STABLE_S, self.is_ready)
        with contextlib.suppress(ConnectionError, ValueError):  # a line that is too long
            async for line in process.stderr:
                log.warning("%s", line.decode(errors="replace").rstrip())
        stable.cancel()
        await process.wait()

    def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin
            self._process.stdin.write(b"\n")
            self._process.stdin.close()
