"""Starts the API processes of a server, shares its connections among them, and replaces those that end or hang.

    clients -> listening socket, here -> the API process with the fewest connections
    API process <-> `ApiProcessLink`, here

A connection is passed on as a descriptor, and kept until the API process says that it took it. If that ends or hangs
before, another one gets the connection.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from inferctl.core.errors import NotReadyError
from inferctl.serve.backend.local_backend import LocalBackend
from inferctl.serve.child import Child
from inferctl.serve.edge.pages import Page
from inferctl.serve.observe import samples
from inferctl.serve.processes.api_process_link import ApiProcessLink
from inferctl.serve.processes.link import Handlers

log = logging.getLogger("inferctl.api_processes")

# A process that was silent for this long gets no connections; after `_HUNG_S`, it is killed.
_SLOW_S, _HUNG_S = 1.0, 10.0
_FULL_S = 1.0  # for which others are preferred to a process that refused a connection
_START_S = 120.0  # until the first sign of life
_TICK_S = 0.1
_SCRAPE_S = 0.2  # after which the last samples of a process are used
_EXIT_S = 3.0  # to end after the drain
_BACKLOG = 256
_WARN_S = 30.0
_MANY_REVOKED = 10_000
_MOST_UNSENT = 1 << 28  # bytes of large results that API processes have not read
_ACCEPTED_AT_ONCE = 64


class ApiProcesses:
    """All API processes of a server, behind the interface of `HttpServer`: `serve` and `close`.

    `welcome`: what each of them needs to start. `state()`: what they need to know of the server, sent when it changes.
    `on_up` is called when one takes connections. `up`: how many do.
    """

    def __init__(
        self,
        count: int,
        welcome: dict[str, Any],
        backend: LocalBackend,
        page: Callable[[str], Awaitable[Page]],
        state: Callable[[], dict[str, Any]],
        on_up: Callable[[], None],
        drain_seconds: float,
    ) -> None:
        self.unfinished_responses = 0
        self._welcome, self._backend, self._page, self._state = welcome, backend, page, state
        self.on_up, self._drain_seconds = on_up, drain_seconds
        self._processes = [_ApiProcessSupervisor(self) for _ in range(count)]
        self._ids = itertools.cycle(range(1 << 32))  # of connections
        self._unassigned: deque[socket.socket] = deque()  # while no process can take connections
        self._listener: socket.socket | None = None
        self._closing = asyncio.Event()
        self._sent_state: dict[str, Any] = {}
        self._revoked: dict[str, None] = {}
        self.served = False  # whether any process ever took connections
        self._warned = -math.inf  # when it was logged that connections cannot be accepted
        self.totals = samples.Totals()

    @property
    def up(self) -> int:
        """How many processes take connections."""
        return sum(process.ready for process in self._processes)

    @property
    def restarts(self) -> int:
        """How often a process was started again."""
        return sum(process.restarts for process in self._processes)

    @property
    def in_flight(self) -> int:
        """How many requests the backend computes."""
        return sum(process.in_flight for process in self._processes)

    @property
    def crash_looping(self) -> bool:
        """Whether some process failed to start again and again, and none takes connections."""
        return not self.up and any(process.crash_looping for process in self._processes)

    async def serve(self, sockets: list[socket.socket]) -> None:
        """Serve until `close` is called, then until the requests in flight are complete or `drain_seconds` passed.

        Raises `NotReadyError` if the processes cannot start.
        """
        (self._listener,) = sockets
        self._listener.listen(_BACKLOG)
        running = [asyncio.create_task(process.run()) for process in self._processes]
        closing = asyncio.create_task(self._closing.wait())
        self._watch(True)
        try:
            while not closing.done():
                await asyncio.wait((closing, *running), timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
                for task in running:
                    if task.done():
                        task.result()  # raises why it cannot start
                self.update()
                self._place()
        finally:
            self._watch(False)
            closing.cancel()
            self._listener.close()
            for each in self._unassigned:
                each.close()
            for process in self._processes:
                process.drain()
            await asyncio.wait(running, timeout=self._drain_seconds + _EXIT_S)
            for process in self._processes:
                process.kill()
            ended, _ = await asyncio.wait(running, timeout=_EXIT_S)
            for task in ended:
                task.exception()  # asyncio would report those of the others, when one was raised

    def close(self) -> None:
        """Accept no more connections. `serve` returns after the requests in flight are complete."""
        self._closing.set()

    def kill(self) -> None:
        """Kill all processes, because this one ends now."""
        for process in self._processes:
            process.kill()

    def update(self) -> None:
        """Send the state of the server to all processes, if it changed."""
        state = self._state()
        if state != self._sent_state:
            self._sent_state = state
            for process in self._processes:
                process.send("state", state)

    def revoke(self, ids: list[str]) -> None:
        """Let all processes refuse these keys."""
        self._revoked |= dict.fromkeys(ids)
        while len(self._revoked) > _MANY_REVOKED:
            del self._revoked[next(iter(self._revoked))]
        for process in self._processes:
            process.send("revoked", ids)

    async def scrape(self) -> None:
        """Get the samples of all processes into `totals`."""
        waiting = [future for process in self._processes if (future := process.scrape())]
        if waiting:
            await asyncio.wait(waiting, timeout=_SCRAPE_S)

    def place(self, connection: socket.socket) -> None:
        """Give a connection to the process with the fewest, or keep it until one can take it."""
        if self._closing.is_set():
            connection.close()
            return
        self._unassigned.append(connection)
        self._place()

    def _watch(self, on: bool) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        if on:
            loop.add_reader(self._listener.fileno(), self._accept)
        else:
            loop.remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                break
            except ConnectionError:  # the client is gone already
                continue
            except OSError as error:  # no descriptors are left: accept none until the next tick
                if time.monotonic() > self._warned + _WARN_S:
                    self._warned = time.monotonic()
                    log.warning("connections cannot be accepted: %s", error)
                self._watch(False)
                return
            connection.setblocking(False)
            self._unassigned.append(connection)
        self._place()

    def _place(self) -> None:
        """Give the connections that wait to processes, and accept no more while many wait."""
        while self._unassigned:
            ready = [process for process in self._processes if process.ready]
            # Compared with the others: on a busy machine, all are late.
            latest = max((process.alive for process in ready), default=0.0)
            able = [process for process in ready if latest - process.alive < _SLOW_S]
            if not able:
                break
            number, connection = next(self._ids), self._unassigned[0]
            able.sort(key=lambda each: (each.full_until > time.monotonic(), each.connections))
            if not any(each.take(number, connection) for each in able):  # the socket of one that does not read is full
                break
            self._unassigned.popleft()
        if self._listener is not None and self._listener.fileno() >= 0 and not self._closing.is_set():
            self._watch(len(self._unassigned) < _BACKLOG)

    def new_link(self, process: _ApiProcessSupervisor) -> ApiProcessLink:
        """Return the link of a process that starts, with the message that it needs first."""
        most = _MOST_UNSENT // len(self._processes)
        link = ApiProcessLink(self._backend, self._page, process.handlers, process.on_lost, most)
        link.messages.send("welcome", self._welcome | {"state": self._state()})
        return link

    def greet(self, process: _ApiProcessSupervisor) -> None:
        """Tell a process that takes connections what it may have missed while it started."""
        self.served = True
        process.send("state", self._state())
        process.send("revoked", list(self._revoked))
        # Not here: an error in it would end the link.
        asyncio.get_running_loop().call_soon(self.on_up)


class _ApiProcessSupervisor(Child):
    """One API process, and its successors. `connections`: which it has, `alive`: its last sign of life."""

    name = "an API process"
    ends_within = _EXIT_S, _EXIT_S

    def __init__(self, owner: ApiProcesses) -> None:
        super().__init__(log.error)
        self.connections, self.alive = 0, 0.0
        self.full_until = 0.0  # it refused connections, and may not refuse them from then on
        self._owner = owner
        self._link: ApiProcessLink | None = None
        self._control: socket.socket | None = None  # for descriptors
        self._kept: dict[int, socket.socket] = {}  # connections that it has not taken yet
        self._scraped: asyncio.Future[None] | None = None
        self._lost = asyncio.Event()
        self._fatal: tuple[str, str | None] | None = None  # why it could not start, as it said
        self.handlers: Handlers = {
            "alive": self._on_alive,
            "hello": self._on_hello,
            "taken": self._on_taken,
            "not_taken": self._on_not_taken,
            "gone": self._on_gone,
            "stats": self._on_stats,
            "fatal": self._on_fatal,
        }

    @property
    def in_flight(self) -> int:
        """How many of its requests the backend computes."""
        return self._link.in_flight if self._link else 0

    @property
    def restartable(self) -> bool:
        """Whether any process ever took connections."""
        return self._owner.served

    def send(self, kind: str, *fields: Any) -> None:
        """Send a message, if the process runs."""
        if self._link is not None:
            self._link.messages.send(kind, *fields)

    async def _start(self) -> asyncio.subprocess.Process:
        self._lost.clear()
        self._fatal = None
        self._ours, theirs = socket.socketpair()
        self._control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (self._ours, self._control):
            each.setblocking(False)
        with theirs, their_control:
            descriptors = theirs.fileno(), their_control.fileno()
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "inferctl.serve.processes.api_process",
                *map(str, descriptors),
                pass_fds=descriptors,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,
                preexec_fn=os.setpgrp,  # Ctrl-C in a terminal is for this process only; in its session, as engines are
            )

    async def _attend(self) -> NotReadyError | None:
        self._link = link = self._owner.new_link(self)
        await asyncio.get_running_loop().create_connection(lambda: link.messages, sock=self._ours)
        self.alive = time.monotonic()
        self.expect(_START_S, what="start")
        await self._lost.wait()
        return NotReadyError(*self._fatal) if self._fatal else None

    async def _left(self, was_ready: bool) -> None:
        self.connections, self._link = 0, None
        if self._control is not None:
            self._control.close()
        self._owner.totals.retire(self)
        if self._scraped and not self._scraped.done():
            self._scraped.set_result(None)

    async def _reap(self, seconds: float) -> tuple[str, int | None]:
        found = await super()._reap(seconds)
        # Its descriptor of a connection that it did not take ends with it, so it must be gone before another answers.
        kept, self._kept = list(self._kept.values()), {}
        for connection in kept:
            self._owner.place(connection)
        return found

    def take(self, number: int, connection: socket.socket) -> bool:
        """Pass a connection on. Return whether that was possible."""
        assert self._control is not None
        try:
            socket.send_fds(self._control, [number.to_bytes(4, "little")], [connection.fileno()])
        except OSError:
            return False
        self._kept[number] = connection
        self.connections += 1
        return True

    def scrape(self) -> asyncio.Future[None] | None:
        """Ask for the samples of the metrics, and return the future of their arrival."""
        if self._link is None or not self.ready:
            return None
        if self._scraped is None or self._scraped.done():
            self._scraped = asyncio.get_running_loop().create_future()
            self.send("scrape")
        return self._scraped

    def drain(self) -> None:
        """Let the process end after the responses in flight. One that starts has none."""
        self.stopping.set()
        if self.ready:
            self.send("drain")
        else:
            self.kill()

    def _on_alive(self) -> None:
        self.alive = time.monotonic()
        self.expect(_HUNG_S)

    def _on_hello(self) -> None:
        """Give it connections from now on."""
        self._on_alive()
        if self.stopping.is_set():
            self.kill()
        else:
            self.is_ready()
            self._owner.greet(self)

    def _on_taken(self, number: int) -> None:
        if connection := self._kept.pop(number, None):
            connection.close()

    def _on_not_taken(self, number: int) -> None:
        """Let another process have a connection, for which this one has no descriptor."""
        if connection := self._kept.pop(number, None):
            self.connections -= 1
            self.full_until = time.monotonic() + _FULL_S
            asyncio.get_running_loop().call_later(_TICK_S, self._owner.place, connection)

    def _on_gone(self) -> None:
        self.connections -= 1

    def _on_stats(self, found: samples.Samples, unfinished: int, scraped: bool) -> None:
        """Take the samples of the metrics. The last ones come with the number of unfinished responses."""
        self._owner.totals.set(self, found)
        self._owner.unfinished_responses += unfinished
        if scraped and self._scraped and not self._scraped.done():
            self._scraped.set_result(None)

    def _on_fatal(self, message: str, hint: str | None) -> None:
        self._fatal = message, hint

    def on_lost(self) -> None:
        """Note that the process closed its end."""
        self._lost.set()
