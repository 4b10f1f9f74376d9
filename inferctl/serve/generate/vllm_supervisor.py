"""Starts vLLM, watches it, and starts it again if it ends, hangs or loses its engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from inferctl.core.errors import NotReadyError
from inferctl.serve.child import Child
from inferctl.serve.generate import control
from inferctl.serve.generate.control import Channel
from inferctl.serve.generate.vllm_process import VllmProcess

# After an engine is lost, how long its requests have to get their errors.
_LOST_S = 5.0


class VllmSupervisor(Child):
    """`start()` starts a vLLM process and returns it. `folder`: where its edge finds the channel.

    `start_seconds`: how long a start may take before the process is killed.
    `listener()` returns the listening socket, when the edge takes it. `on_ready` is called before the edge accepts
    connections, `on_lost` after it stopped. `on_adapter(message)` returns the answer to what it sends about adapters.
    """

    name = "vLLM"
    crash_loop_starts = 3  # each may take minutes
    ends_within = 0.0, 10.0

    def __init__(
        self,
        start: Callable[[], Awaitable[VllmProcess]],
        folder: Path,
        hang_seconds: float,
        start_seconds: float,
        listener: Callable[[], socket.socket],
        on_ready: Callable[[], Awaitable[None]],
        on_lost: Callable[[], None],
        on_adapter: Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]],
        notify: Callable[[str], None],
    ) -> None:
        super().__init__(notify)
        self._start_vllm, self._listener = start, listener
        self._hang_seconds, self._start_seconds = hang_seconds, start_seconds
        self._on_ready, self._on_lost, self._on_adapter = on_ready, on_lost, on_adapter
        self._answering: set[asyncio.Task[None]] = set()
        self._control = control.listen(folder)
        self._vllm: VllmProcess
        self._channel: Channel | None = None  # to an edge that has the listening socket
        self._draining = False
        self._drain_end = 0.0
        self.adapters: list[dict[str, Any]] = []  # as in `GET /info`
        self.unfinished = 0  # responses that were not complete when the drain ended

    async def _start(self) -> asyncio.subprocess.Process:
        self._vllm = await self._start_vllm()
        return self._vllm.process

    async def _attend(self) -> NotReadyError | None:
        try:
            async with asyncio.timeout(self._start_seconds):
                channel = await self._connected()
        except TimeoutError:
            return self._vllm.overdue(self._start_seconds)
        if channel is None:
            return None
        if isinstance(channel, NotReadyError):
            return channel
        self.is_ready()
        await self._on_ready()
        if self.stopping.is_set():
            channel.close()  # the edge still waits for the listening socket
            return None
        return NotReadyError(await self._serve(channel))

    async def _left(self, was_ready: bool) -> None:
        if self.stopping.is_set() and self._process and self._process.returncode is None:
            self._vllm.ending = True
            # Only to vLLM's API process. That ends its engine, and logs an error if the engine ends first.
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    async def _reap(self, seconds: float) -> tuple[str, int | None]:
        found = await super()._reap(seconds)
        if self._process:
            await self._vllm.finish()
        if self._channel:  # an edge that lives when it is closed removes the folder
            self._channel.close()
            self._channel = None
        return found

    def _failure(self, how: str, code: int | None) -> NotReadyError:
        return self._vllm.failure(how, code) if self._process else NotReadyError(f"vLLM {how}")

    async def _serve(self, channel: Channel) -> str:
        """Hand the listening socket over, and return why this vLLM process is not usable any more."""
        with contextlib.suppress(OSError):
            channel.send_listener(self._listener())
        self._channel = channel
        if self._draining:
            channel.send("drain")
        reason = await self._watch(channel)
        if not self.stopping.is_set():
            self._on_lost()
            await self._fail_requests(channel)
        return reason

    async def _connected(self) -> Channel | NotReadyError | None:
        """Wait until the edge is ready; None if the process ends, or `stop` is called, first. Return why it is not."""
        assert self._process
        loop = asyncio.get_running_loop()
        accepting = asyncio.ensure_future(loop.sock_accept(self._control))
        others = [asyncio.ensure_future(other) for other in (self._process.wait(), self.stopping.wait())]
        try:
            await asyncio.wait((accepting, *others), return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                return None
        finally:
            for each in (accepting, *others):
                each.cancel()  # without effect if it is done
        channel = Channel(accepting.result()[0])
        message = await channel.receive()
        if message and message["kind"] == "ready":
            self.adapters = message["adapters"]
            return channel
        channel.close()
        return NotReadyError(message["message"], message["hint"]) if message else None

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
            if message["kind"] in control.OF_ADAPTERS:
                self._answering.add(task := asyncio.create_task(self._answer(channel, message)))
                task.add_done_callback(self._answering.discard)
                continue
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

    async def _answer(self, channel: Channel, message: dict[str, Any]) -> None:
        if (answer := await self._on_adapter(message)) is not None:
            channel.send(**answer)

    def _message_timeout(self) -> float:
        """Return how many seconds may pass without a message."""
        if not self.stopping.is_set():
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
        self.stopping.set()
        if self._channel:
            self._channel.send("close", seconds=seconds, code="stopped", message="the server stopped")

    def close(self) -> None:
        """Close the channel's listening socket."""
        self._control.close()
