"""The API process owns the engine process: starts it, hears of its death at once, starts it again with growing pauses.

The two share a socket pair; when one side dies the other reads end of file. Batches that were with the engine are handed back to the listener.
An engine that sits on a batch for too long is killed, and then dies like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Protocol

from inferctl.errors import InferctlError
from inferctl.serve import frames
from inferctl.serve.frames import Kind
from inferctl.serve.types import Batch, BatchResult, EngineConfig, EngineInfo

log = logging.getLogger("inferctl.supervisor")

_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 30.0
# Starts in a row that never became ready, after which the whole server should be restarted from outside.
_HOPELESS = 5
_STOP_SECONDS = 5.0
# An engine may take this many times as long to start as the first one did, and this many seconds at least.
_SLOW_START = 5.0
_SHORTEST_START = 120.0
_CHECKS = 8  # looks at the clock within the time that a batch may take
# OpenMP threads that spin while they wait take the cores that the API process needs: with one busy neighbour on two cores, spinning made a
# forward 5 to 40 times slower. TOKENIZERS_PARALLELISM: the engine tokenises its check texts only.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class EngineStartError(InferctlError):
    """The engine said why it cannot start; the exit code is the one of its own error."""

    def __init__(self, message: str, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class Listener(Protocol):
    """Who wants to know what the engine does. Called on the event loop."""

    def engine_ready(self, info: EngineInfo) -> None:
        """The engine takes batches from now on."""

    def engine_lost(self) -> None:
        """The engine is gone, with every batch that it had not answered."""

    def batch_done(self, result: BatchResult) -> None:
        """A batch came back."""

    def batch_failed(self, number: int, message: str, out_of_memory: bool) -> None:
        """A batch failed; the engine is still there."""


class Supervisor:
    """Keeps one engine process alive. `failures` counts its starts in a row that came to nothing, `restarts` all but the first start.

    `patience()`: seconds after which a batch means that the engine hangs. `essential`: a first start that fails ends it all.
    """

    def __init__(
        self,
        config: EngineConfig,
        listener: Listener,
        patience: Callable[[], float] = lambda: 60.0,
        *,
        essential: bool = True,
    ) -> None:
        self.restarts = self.failures = self.hangs = 0
        self.pid: int | None = None
        self._config, self._listener, self._patience, self._essential = config, listener, patience, essential
        self._writer: asyncio.StreamWriter | None = None
        self._stopping = asyncio.Event()
        self._ready = False  # this life has been
        self._batches: dict[int, float] = {}  # with the engine, the oldest first, and when they were sent
        self._since = 0.0  # when this life began
        self._start_seconds: float | None = None  # the first time
        self._known: dict[str, Any] | None = None  # what the engine said when it was last ready

    @property
    def hopeless(self) -> bool:
        """Whether the engine failed to start so often in a row that waiting longer is not honest."""
        return self.failures >= _HOPELESS

    def send(self, batch: Batch) -> None:
        """Hand a batch to the engine. Only while it is ready."""
        assert self._writer is not None
        self._batches[batch.id] = asyncio.get_running_loop().time()
        self._writer.write(frames.pack_batch(batch))

    async def run(self) -> None:
        """Keep the engine running until `stop`. Raises `EngineStartError` when the very first start fails."""
        while not self._stopping.is_set():
            problem = await self._live()
            if not self._stopping.is_set():
                self.failures = 0 if self._ready else self.failures + 1
                self.restarts += 1
            self._listener.engine_lost()
            if self._stopping.is_set():
                return
            if self._start_seconds is None and self._essential:
                raise problem
            pause = min(_FIRST_PAUSE * 2 ** min(self.failures, 10), _LONGEST_PAUSE)
            log.error("%s; starting it again in %.2g s", problem.message, pause)
            try:
                await asyncio.wait_for(self._stopping.wait(), pause)
            except TimeoutError:
                continue

    def stop(self) -> None:
        """Let the engine end; `run` returns soon after."""
        self._stopping.set()
        if self._writer is not None:
            self._writer.close()

    def kill(self) -> None:
        """End this engine, and start another."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def _live(self) -> EngineStartError:
        """One life of the engine process, from start to death; returns why it ended."""
        self._ready, self._since = False, asyncio.get_running_loop().time()
        self._batches.clear()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await self._spawn(theirs)
            except OSError as error:
                ours.close()
                return EngineStartError(f"the engine process cannot be started: {error}", None, 1)
        self.pid = process.pid
        watchdog = asyncio.create_task(self._watch(process))
        try:
            reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
            self._writer.write(frames.pack_json(Kind.CONFIG, asdict(replace(self._config, known=self._known))))
            if self._stopping.is_set():  # `stop` came before there was anything to close
                self._writer.close()
            problem = await self._listen(reader)
        finally:
            watchdog.cancel()
            if self._writer is not None:
                self._writer.close()
            # Nothing is lost with an engine that still loads.
            code = await _reap(process, 0 if self._stopping.is_set() and not self._ready else _STOP_SECONDS)
            self.pid, self._writer = None, None
        return problem or EngineStartError(
            f"the engine process ended unexpectedly ({_ending(code)})", "its last words are above", 1
        )

    async def _spawn(self, theirs: socket.socket) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "inferctl.serve.worker",
            str(theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            env=_ENVIRONMENT | os.environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=2,  # whatever a library prints must not end up in the server's stdout
        )

    async def _listen(self, reader: asyncio.StreamReader) -> EngineStartError | None:
        loop = asyncio.get_running_loop()
        while (frame := await frames.receive_async(reader)) is not None:
            kind, body = frame
            if kind is Kind.RESULT:
                result = frames.unpack_result(body)
                del self._batches[result.id]
                self._listener.batch_done(result)
            elif kind is Kind.FAILED:
                failed = json.loads(body)
                del self._batches[failed["id"]]
                self._listener.batch_failed(failed["id"], failed["message"], failed["out_of_memory"])
            elif kind is Kind.READY and not self._stopping.is_set():
                self._ready, self.failures = True, 0
                self._start_seconds = self._start_seconds or loop.time() - self._since
                self._known = json.loads(body)
                self._listener.engine_ready(EngineInfo.from_json(self._known))
            elif kind is Kind.FATAL:
                fatal = json.loads(body)
                return EngineStartError(fatal["message"], fatal["hint"], fatal["exit_code"])
        return None

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill the engine when it sits on a batch, or on a later start, for too long."""
        loop = asyncio.get_running_loop()
        while (limit := self._allowed()) is None or loop.time() - self._oldest() <= limit:
            await asyncio.sleep(max(0.01, self._patience() / _CHECKS))
        self.hangs += 1
        log.error("the engine has not answered for %.3g s; killing it", limit)
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    def _allowed(self) -> float | None:
        """How long what the engine does now may take; None for as long as it likes."""
        if self._ready:
            return self._patience() if self._batches else None
        return self._start_seconds and max(_SHORTEST_START, _SLOW_START * self._start_seconds)

    def _oldest(self) -> float:
        """When that began which is not done yet."""
        return next(iter(self._batches.values()), self._since)


async def _reap(process: asyncio.subprocess.Process, patience: float) -> int:
    """Wait for the end of a process that has been told, and make it end after `patience` seconds."""
    try:
        return await asyncio.wait_for(process.wait(), patience)
    except (TimeoutError, asyncio.CancelledError):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return await process.wait()


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
