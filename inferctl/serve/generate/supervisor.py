"""Starts vLLM, watches it, and starts it again if it ends, hangs or loses its engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferctl.core.errors import NotReadyError
from inferctl.serve.generate import control
from inferctl.serve.generate.control import Channel
from inferctl.serve.generate.process import VllmProcess

_CRASH_LOOP = 3  # starts in a row that fail
_MAX_PAUSE_S = 60.0
# After an engine is lost, how long its requests have to get their errors.
_LOST_S = 5.0


class VllmSupervisor:
    """`start()` starts a vLLM process and returns it. `folder`: where its edge finds the channel.

    `start_seconds`: how long a start may take before the process is killed.
    `listener()` returns the listening socket, when the edge takes it. `on_ready` is called before the edge accepts
    connections, `on_lost(reason)` after it stopped.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        folder: Path,
        hang_seconds: float,
        start_seconds: float,
        listener: Callable[[], socket.socket],
        on_ready: Callable[[], Any],
        on_lost: Callable[[str], None],
        notify: Callable[[str], None],
    ) -> None:
        self._start, self._listener = start, listener
        self._hang_seconds, self._start_seconds = hang_seconds, start_seconds
        self._on_ready, self._on_lost, self._notify = on_ready, on_lost, notify
        self._control = control.listen(folder)
        self._process: VllmProcess | None = None
        self._channel: Channel | None = None  # to an edge that has the listening socket
        self._draining = False
        self._stopping = asyncio.Event()
        self._drain_end = 0.0
        self._failed_starts = 0
        self.restarts = 0
        self.unfinished = 0  # responses that were not complete when the drain ended

    @property
    def crash_looping(self) -> bool:
        """Whether vLLM fails to start again and again."""
        return self._failed_starts >= _CRASH_LOOP

    async def run(self) -> None:
        """Run vLLM until `stop`. Raises `NotReadyError` if its first start fails."""
        while not self._stopping.is_set():
            self._process = process = await self._start()
            channel = overdue = None
            try:
                async with asyncio.timeout(self._start_seconds):
                    channel = await self._connected(process)
            except TimeoutError:
                overdue = process.overdue(self._start_seconds)
            if channel is None:
                await process.end(gently=self._stopping.is_set())
                if not self._stopping.is_set():
                    await self._failed(overdue or process.failure(await process.wait()))
                continue
            self._failed_starts = 0
            await self._on_ready()
            if not self._stopping.is_set():
                await self._serve(channel)
            else:
                channel.close()  # the edge still waits for the listening socket
            await process.end(gently=self._stopping.is_set())
            channel.close()
            self._channel = None

    async def _serve(self, channel: Channel) -> None:
        """Hand the listening socket over, and return when this vLLM process stopped or is no longer usable."""
        with contextlib.suppress(OSError):
            channel.send_listener(self._listener())
        self._channel = channel
        if self._draining:
            channel.send("drain")
        reason = await self._watch(channel)
        if not self._stopping.is_set():
            self._on_lost(reason)
            await self._fail_requests(channel)
            self.restarts += 1

    async def _failed(self, failure: NotReadyError) -> None:
        if not self.restarts:
            raise failure
        self._failed_starts += 1
        pause_s = min(_MAX_PAUSE_S, 2.0**self._failed_starts)
        self._notify(f"{failure.message}; next try in {pause_s:g} s")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause_s)

    async def _connected(self, process: VllmProcess) -> Channel | None:
        """Wait until the edge of `process` is ready; None if the process ends, or `stop` is called, first."""
        loop = asyncio.get_running_loop()
        accepting = asyncio.ensure_future(loop.sock_accept(self._control))
        others = [asyncio.ensure_future(other) for other in (process.wait(), self._stopping.wait())]
        try:
            await asyncio.wait((accepting, *others), return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                return None
        finally:
            for each in (accepting, *others):
                each.cancel()  # without effect if it is done
        channel = Channel(accepting.result()[0])
        if await channel.receive():
            return channel
        channel.close()
        return None

    async def _watch(self, channel: Channel) -> str:
        """Return why this vLLM process is no longer usable, or that it stopped."""
        progress, moved = 0.0, time.monotonic()
        while True:
            try:
                message = await asyncio.wait_for(channel.receive(), self._message_timeout())
            except TimeoutError:
                # If this process was stopped too, the messages of that time are not read yet.
                try:
                    message = await asyncio.wait_for(channel.receive(), _LOST_S)
                except TimeoutError:
                    return f"vLLM did not respond for {self._hang_seconds:g} s"
                moved = time.monotonic()
            if message is None:
                return "vLLM ended"
            if message["kind"] == "closed":
                self.unfinished += message["unfinished"]
                return "stopped"
            if not message["healthy"]:
                return "vLLM's engine ended"
            now = time.monotonic()
            if not message["running"] or message["progress"] != progress:
                progress, moved = message["progress"], now
            elif now - moved > self._hang_seconds:
                return f"vLLM's engine made no progress for {self._hang_seconds:g} s"

    def _message_timeout(self) -> float:
        """Return how many seconds may pass without a message."""
        if not self._stopping.is_set():
            return self._hang_seconds
        return max(1.0, self._drain_end + _LOST_S - time.monotonic())

    async def _fail_requests(self, channel: Channel) -> None:
        """Let the requests of a lost engine end with an error."""
        channel.send("close", seconds=0.5, code="engine_lost", message=control.ENGINE_LOST)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOST_S):
                while (answer := await channel.receive()) is not None and answer["kind"] != "closed":
                    pass

    def drain(self) -> None:
        """Report that the server is not ready, and accept requests."""
        self._draining = True
        if self._channel:
            self._channel.send("drain")

    def stop(self, seconds: float) -> None:
        """Accept no more connections, wait up to `seconds` for the responses, and let `run` return."""
        self._drain_end = time.monotonic() + seconds
        self._stopping.set()
        if self._channel:
            self._channel.send("close", seconds=seconds, code="stopped", message="the server stopped")

    def kill(self) -> None:
        """Kill vLLM at once."""
        if self._process:
            self._process.kill()

    def close(self) -> None:
        """Close the channel's listening socket."""
        self._control.close()
