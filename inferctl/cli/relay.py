"""`inferctl relay`: usage events to the ledger, keys from a database, and limits between servers."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import console, lazy, options
from inferctl.core.errors import UsageError, needs_packages
from inferctl.tenancy.metering import outbox

EPILOG = """\b
Examples:
  # Store the events of a server that runs in a container with the volume ./metering
  inferctl relay --data ./metering --ledger postgresql://usage@db/usage
  # On each machine with servers: publish the events; next to the database: store them
  inferctl relay --data ./metering --broker nats://broker:4222
  inferctl relay --consume --broker nats://broker:4222 --ledger postgresql://usage@db/usage
"""


@options.with_settings("metering.data", "metering.ledger", "metering.broker")
def relay(
    flags: options.Flags,
    spec_file: options.SpecFile = None,
    consume: Annotated[
        bool, typer.Option("--consume", help="Store what the broker has, instead of reading a folder.")
    ] = False,
) -> None:
    """Bring usage events to the ledger until Ctrl-C or SIGTERM, then store what is left. Exchange keys and limits.

    `inferctl serve` starts a relay of its own, unless the packages of the ledger are missing, as in an image.
    """
    spec = options.without_model(spec_file, flags)
    settings, access = spec.metering, spec.access
    if consume and not settings.broker:
        raise UsageError("`--consume` requires a broker", "pass `--broker nats://HOST:4222`, or set metering.broker")
    with needs_packages("`inferctl relay`", "ledger"), lazy.deferred_signals():
        from inferctl.tenancy.relay.relay import Relay
    # Without usage events, keys and limits may be all that the relay is for.
    wanted = settings.mode != "off" or consume or any(flags.values()) or not access.has_relay
    metering = settings if wanted else None
    folder = Path(settings.data)
    if flags["metering.data"] and not folder.is_dir():
        raise UsageError(
            f"--data: the folder {folder} does not exist", "name the `metering.data` of a server, which makes it"
        )
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)

    async def run() -> None:
        loop, running = asyncio.get_running_loop(), Relay(metering, access, consume=consume)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, running.end)
        if metering:
            console.note(f"storing the usage events of {settings.broker if consume else settings.data}")
            if not consume and not outbox.folders(folder):
                console.note(f"no server records usage in {folder.absolute()} now; this relay waits for one")
        if access.has_relay:
            console.note(f"serving keys and limits in {access.data}")
        await running.run()

    asyncio.run(run())
    sys.stderr.flush()
    # Python would need a second of CPU time to free what it loaded: ten seconds with the tenth of a core of a sidecar.
    os._exit(0)
