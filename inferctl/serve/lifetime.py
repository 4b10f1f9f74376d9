"""What the servers of all tasks share from the start to the exit code: port, signals, drain, metering and relay."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from inferctl.config.spec import Spec, Task
from inferctl.core import outputs
from inferctl.core.errors import EXIT_INTERRUPTED, NotReadyError
from inferctl.core.sizes import parse_size
from inferctl.serve import relay_process
from inferctl.serve.child import Helper
from inferctl.serve.edge import access, listener
from inferctl.serve.edge_setup import EdgeSetup
from inferctl.serve.observe import metering
from inferctl.serve.observe.progress import StartProgress
from inferctl.serve.options import ServerOptions
from inferctl.serve.signals import EXIT_TERMINATED, StopSignals

_FLUSH_S = 1.0  # for the last usage events, if requests needed all of `drain_seconds`


class ServerLifetime(ABC):
    """One server, from its start to its exit code. The server of a task serves, drains and ends what computes.

    The port is open before anything is loaded. After the first signal, the server accepts requests for the grace period
    and completes them for `drain_seconds`. A second signal kills what computes.
    """

    _socket: socket.socket
    _url: str

    def __init__(
        self,
        spec: Spec,
        task: Task | None,
        options: ServerOptions,
        notify: Callable[[str], None],
        progress: StartProgress,
        *,
        tasks: Mapping[str, Task] = {},
        records: bool = True,
    ) -> None:
        """`task`, `tasks`: as of `ServerMetering`. `records`: whether this process records its requests; other
        processes of the server may do it.
        """
        self._spec, self._options, self._notify, self._progress = spec, options, notify, progress
        self._started = time.monotonic()
        self._relay = relay_process.start(spec, notify)
        self._batch_secret = secrets.token_hex(32)  # with which the worker sends requests of keys; of this start only
        self._batches: Helper | None = None
        models, log, traces = key_names(spec), options.log, options.traces
        recording = spec.metering if records else spec.metering.model_copy(update={"mode": "off"})
        self._setup = setup = EdgeSetup(
            spec.name,
            models,
            task,
            spec.access,
            recording,
            self._ready,
            self._live,
            log=log,
            traces=traces,
            tasks=tasks,
            batches=spec.serve.batches,
            batch_secret=self._batch_secret,
        )
        self._metering, self._access, self._lifecycle = setup.metering, setup.access, setup.lifecycle
        self._drain_end = 0.0
        self._signals = 0
        self._interrupted = False
        self._failure: NotReadyError | None = None

    async def run(self, signals: StopSignals) -> int:
        """Serve until a signal arrives, and return the exit code. Raises `NotReadyError` if the start fails."""
        listener.raise_file_limit()
        relay: asyncio.Task[None] | None = None
        batches: asyncio.Task[None] | None = None
        showing = asyncio.create_task(self._progress.run())
        try:
            self._socket = listener.listen(self._spec.serve.host, self._spec.serve.port)
            self._url, host = listener.reached_at(self._socket, self._spec.serve.host, self._options.published)
            for warning in self._warnings(host):
                self._notify(f"warning    {warning}")
            self._metering.open()
            relay = asyncio.create_task(self._relay.run()) if self._relay else None
            batches = asyncio.create_task(self._run_batches())
            signals.connect(self._handle_signal)
            unfinished = await self._serve()
        finally:
            showing.cancel()
            closing = asyncio.create_task(self._close_metering(relay))
            try:
                await self._end()
            finally:
                await closing
                if batches:
                    self._stop_batches()
                    await batches
        if self._failure:
            raise self._failure
        if unfinished:
            limit = self._spec.serve.drain_seconds
            self._notify(f"stopped after {limit:g} s; requests without a response: {unfinished}")
            return 1
        if self._lifecycle.started or not self._interrupted:
            self._notify("stopped")
        return EXIT_INTERRUPTED if self._interrupted else 0

    async def _run_batches(self) -> None:
        settings = self._spec.serve.batches
        if settings.folder:
            values = {"folder": settings.folder, "url": self._url, "secret": self._batch_secret}
            log = logging.getLogger("inferctl.batches")
            self._batches = Helper("the worker of batches", "inferctl.serve.batches.worker", values, log)
            await self._batches.run()

    def _stop_batches(self) -> None:
        """Let no more requests of batches begin, and write the responses to those in flight."""
        if self._batches and not self._batches.stopping.is_set():
            self._batches.stop(self._spec.serve.drain_seconds + _FLUSH_S, "write the last responses")

    @abstractmethod
    def _ready(self) -> bool:
        """Return whether the task can compute."""

    @abstractmethod
    def _live(self) -> bool:
        """Return False if the process should be restarted."""

    @abstractmethod
    async def _serve(self) -> int:
        """Serve until `_close` was called and the responses are complete. Return how many are not."""

    @abstractmethod
    def _drain(self) -> str:
        """Report that the server is not ready, and accept requests. Return what is known of those in flight."""

    @abstractmethod
    def _close(self, seconds: float) -> None:
        """Accept no more requests, and let `_serve` return after those in flight, within `seconds`."""

    @abstractmethod
    async def _end(self) -> None:
        """End what computes. Raises its error."""

    @abstractmethod
    def _kill(self) -> None:
        """Kill what computes, because the process ends now."""

    def _warnings(self, host: str) -> Iterator[str]:
        yield from access.warnings(self._spec.access, host)
        yield from metering.warnings(self._spec.metering)

    def _announce(self) -> None:
        """Write the file that other processes wait for. If that fails, the server ends: they would wait forever."""
        if self._options.announce:
            try:
                outputs.announce(self._options.announce, self._url)
            except NotReadyError as error:
                self._failure = error
                self._close_port()

    def _handle_signal(self, number: int) -> None:
        self._signals += 1
        self._progress.stop()
        self._interrupted |= number == signal.SIGINT
        if self._signals > 1:
            self._kill()
            os._exit(EXIT_INTERRUPTED if self._interrupted else EXIT_TERMINATED)
        self._lifecycle.draining = True
        self._stop_batches()
        in_flight = self._drain()
        if self._lifecycle.started:
            self._notify(f"shutting down; {in_flight}a second signal stops at once")
        # Load balancers notice `/readyz` with a delay, so requests are accepted for the grace period. After Ctrl-C, and
        # before the server was ready, no load balancer has to be waited for.
        grace = 0 if self._interrupted or not self._lifecycle.started else self._spec.serve.grace_seconds
        asyncio.get_running_loop().call_later(grace, self._close_port)

    def _close_port(self) -> None:
        seconds = self._spec.serve.drain_seconds
        self._drain_end = time.monotonic() + seconds
        self._lifecycle.closed = True
        self._close(seconds)

    async def _close_metering(self, relay: asyncio.Task[None] | None) -> None:
        """Record the last requests, and let the relay store them before the drain ends."""
        left = max(_FLUSH_S, self._drain_end - time.monotonic())
        await self._metering.close(left)
        if self._relay and relay:
            self._relay.stop(left, "store all usage events, which the next one in this folder does,")
            await relay


def key_names(spec: Spec) -> list[str]:
    """Return the names of models and adapters that keys of a server may have. Aliases are for requests only."""
    models = [(one.name, one.model) for one in spec.each()]
    return [
        each for name, model in models for each in (name, model.source, *(adapter.name for adapter in model.adapters))
    ]


def without_stores(spec: Spec, processes: int = 1) -> dict[str, Any]:
    """Return a spec as JSON data for processes that connect to no store and no broker, so they need no password.

    The name of their key file follows from the address of the database with the keys. The outboxes of `processes` share
    the size of the server's, which is that of its volume.
    """
    keys, broker = spec.access.public_key_store or spec.access.keys, spec.access.broker
    outbox_size = str(parse_size(spec.metering.outbox_size) // processes)
    changes: dict[str, dict[str, Any]] = {
        "access": {"keys": keys, "broker": broker.public if broker else None},
        "metering": {"ledger": None, "broker": None, "outbox_size": outbox_size},
    }
    document = spec.model_dump(mode="json", exclude_unset=True)  # what a model does not set is as for the whole server
    return document | {name: document.get(name, {}) | values for name, values in changes.items()}
