"""An API process: the front end of a server whose backend is another process, its parent.

    python -m inferctl.serve.processes.api_process FD CONTROL_FD

FD is a stream socket for a `Link`; descriptors of connections arrive at CONTROL_FD. The process ends when the backend
says so, or ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from inferctl.config.spec import Spec
from inferctl.core import streams
from inferctl.core.errors import InferctlError
from inferctl.reading import task_config
from inferctl.serve import event_loop
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.child import end_with_parent
from inferctl.serve.edge import access, listener
from inferctl.serve.edge.connection import Connection
from inferctl.serve.edge.pages import Page
from inferctl.serve.edge_setup import EdgeSetup
from inferctl.serve.front_end import FrontEnd
from inferctl.serve.lifetime import key_names
from inferctl.serve.observe import logs
from inferctl.serve.observe.metrics import Metrics
from inferctl.serve.observe.server_metrics import ServerMetrics
from inferctl.serve.processes.link import Handlers, Link
from inferctl.serve.processes.remote_backend import RemoteBackend
from inferctl.serve.text.tokenizer_pool import TokenizerPool

_ALIVE_S, _STATS_S = 0.1, 1.0
_FLUSH_S = 1.0  # for the last usage events
_MOST_AT_ONCE = 64


class ApiProcess:
    """One front end. Runs on the event loop."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._backend = RemoteBackend()
        handlers: Handlers = {
            "welcome": self._on_welcome,
            "state": self._on_state,
            "revoked": self._on_revoked,
            "drain": self._on_drain,
            "scrape": self._on_scrape,
        }
        self.link = self._backend.link = Link({**self._backend.handlers, **handlers}, self._on_lost)
        self._welcome: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()  # the backend ended
        self._built = False  # whether there is a front end, which frames are for
        self._state: dict[str, Any] = {}
        self._adopting: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until the drain or the end of the backend."""
        welcome = await self._welcome
        spec, processes = Spec.model_validate(welcome["spec"]), welcome["processes"]
        logs.configure(welcome["log"])
        listener.raise_file_limit()
        counted: dict[str, Metrics] = {}
        models: list[tuple[ServedModel, TokenizerPool]] = []
        several = len(welcome["models"]) > 1
        for number, (one, (task, folder, slo)) in enumerate(zip(spec.each(), welcome["models"], strict=True)):
            config = task_config.read(task, Path(folder), one.serve.max_input_tokens)
            own = counted[one.name] = Metrics(slo, one.name if several else None)
            tokenizer = TokenizerPool(Path(folder), config, on_truncated=own.truncated.inc)
            models.append((ServedModel.of(one, config, welcome["truncate"], number), tokenizer))
        self._metrics = metrics = ServerMetrics(counted)
        setup = EdgeSetup(
            spec.name,
            key_names(spec),
            None if several else models[0][0].task,
            spec.access,
            spec.metering,
            self._ready,
            log=welcome["log"],
            traces=welcome["traces"],
            tasks={model.name: model.task for model, _ in models} if several else {},
            batches=spec.serve.batches,
            batch_secret=welcome["batch_secret"],
        )
        self._metering, self._access, self._lifecycle = setup.metering, setup.access, setup.lifecycle
        self._metering.open()
        self._metering.watch(metrics.general)
        metrics.general.watch_threads("api", *(tokenizer.threads for _, tokenizer in models))
        self._front = FrontEnd(
            spec,
            models,
            setup,
            metrics,
            self._backend,
            self._page,
            processes=processes,
            connection=_counting(self.link, processes),
        )
        self._built = True
        self._set_state(welcome["state"])
        serving = asyncio.create_task(self._front.serve([]))
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._control.fileno(), self._take)
        event_loop.freeze_garbage()
        self.link.send("hello")
        beating = asyncio.create_task(self._beat())
        ended = asyncio.create_task(self._ended.wait())
        await asyncio.wait((serving, ended), return_when=asyncio.FIRST_COMPLETED)
        loop.remove_reader(self._control.fileno())
        beating.cancel()
        if not serving.done():  # the backend ended: the requests in flight have failed
            self._front.http.config.timeout_graceful_shutdown = 0
            self._front.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(serving), spec.serve.drain_seconds + _FLUSH_S)
        await asyncio.sleep(0.05)  # cancelled requests send their last event
        await self._metering.close(_FLUSH_S)
        self._send_stats(unfinished=self._front.unfinished_responses)
        await self._close()

    def _ready(self) -> bool:
        return bool(self._state["ready"])

    async def fail(self, error: InferctlError) -> None:
        """Tell the backend why this process cannot start."""
        self.link.send("fatal", error.message, error.hint)
        await self._close()

    async def _close(self) -> None:
        """End the link after the last frames are sent."""
        self.link.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), _FLUSH_S)

    async def _page(self, path: str) -> Page:
        """Return the page of the whole server, which no process is ready for without the keys."""
        if path in ("/readyz", "/health") and not access.known(self._access):
            return 503, f"{self._lifecycle.phase}\n".encode(), "text/plain"
        return await self._backend.page(path)

    def _on_welcome(self, welcome: dict[str, Any]) -> None:
        self._welcome.set_result(welcome)

    def _on_state(self, state: dict[str, Any]) -> None:
        if self._built:  # else it gets all that again after "hello"
            self._set_state(state)

    def _on_revoked(self, ids: list[str]) -> None:
        if self._built and self._access:
            self._access.revoke(ids)

    def _on_drain(self) -> None:
        self._lifecycle.closed = True
        self._front.close()

    def _on_scrape(self) -> None:
        self._send_stats(scraped=True)

    def _set_state(self, state: dict[str, Any]) -> None:
        self._state, lifecycle = state, self._lifecycle
        lifecycle.started, lifecycle.draining = state["started"], state["draining"]
        lifecycle.closed |= state["closed"]
        for model, found in zip(self._front.models, state["models"], strict=True):
            if found["device"]:
                self._front.set_sizes(model.number, found)
                self._metering.ready(found["device"], found["digest"], model.name)

    def _on_lost(self) -> None:
        if not self._welcome.done():  # the backend ended before it said what to do
            os._exit(1)
        self._ended.set()
        if self._built:
            self._backend.lost()

    def _take(self) -> None:
        """Take the connections that the backend passes on."""
        for _ in range(_MOST_AT_ONCE):
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, 4, 1)
            except (BlockingIOError, ConnectionError):
                return
            if not data:  # the backend ended
                asyncio.get_running_loop().remove_reader(self._control.fileno())
                return
            if not descriptors:  # this process has too many
                self.link.send("not_taken", int.from_bytes(data, "little"))
                continue
            connection = socket.socket(fileno=descriptors[0])
            connection.setblocking(False)
            # Before its first byte is read: from now on, nobody else can answer.
            self.link.send("taken", int.from_bytes(data, "little"))
            self.link.flush()
            task = asyncio.get_running_loop().create_task(self._adopt(connection))
            self._adopting.add(task)
            task.add_done_callback(self._adopting.discard)

    async def _adopt(self, connection: socket.socket) -> None:
        try:
            if self._lifecycle.closed:  # it was passed on just before the drain
                raise ConnectionAbortedError
            await self._front.http.adopt(connection)
        except OSError:  # the client is gone
            connection.close()
            self.link.send("gone")

    async def _beat(self) -> None:
        """Say that the event loop runs. If this process is killed, what it counted is known up to `_STATS_S` before."""
        while True:
            self._send_stats()
            for _ in range(round(_STATS_S / _ALIVE_S)):
                self.link.send("alive")
                await asyncio.sleep(_ALIVE_S)

    def _send_stats(self, *, unfinished: int = 0, scraped: bool = False) -> None:
        self.link.send("stats", self._metrics.report(), unfinished, scraped)


def _counting(link: Link, processes: int) -> type[Connection]:
    """Return the class of connections that tells the backend when one ends. They share what a server can hold."""
    most, unread = Connection.max_connections // processes, Connection.max_unread_bytes // processes

    class Counted(Connection):
        max_connections = most
        max_unread_bytes = unread

        def connection_lost(self, exc: Exception | None) -> None:
            """Forget the connection."""
            super().connection_lost(exc)
            link.send("gone")

    return Counted


async def _main() -> None:
    link_socket, control = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    for each in (link_socket, control):
        each.setblocking(False)
    process = ApiProcess(control)
    await asyncio.get_running_loop().create_connection(lambda: process.link, sock=link_socket)
    try:
        await process.run()
    except InferctlError as error:
        await process.fail(error)


def main() -> None:
    """Run the API process."""
    streams.guard()
    # Someone may send these to all processes. The backend decides when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(3 * _FLUSH_S, lambda: os._exit(1))
    with event_loop.runner() as runner:
        runner.run(_main())


if __name__ == "__main__":
    main()
