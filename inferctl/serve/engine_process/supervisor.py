"""Starts the engine process from the API process, detects its end at once, and restarts it with growing pauses.

The two processes share a socket pair; if one ends, the other reads end of file. The listener then requeues the batches
in flight. An engine that takes too long for a batch is killed and restarted.
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
from inferctl.serve.engine_process import frames
from inferctl.serve.engine_process.engine_protocol import Batch, BatchResult, EngineConfig, EngineInfo
from inferctl.serve.engine_process.frames import Kind

log = logging.getLogger("inferctl.supervisor")

_MIN_PAUSE_S = 0.25
_MAX_PAUSE_S = 30.0
# After this many failed starts in a row, the whole server should be restarted from outside.
_CRASH_LOOP_STARTS = 5
_STOP_TIMEOUT_S = 5.0
# A restarted engine is killed if its load takes more than this many times the first load and more than these seconds.
_START_TIMEOUT_FACTOR = 5.0
_MIN_START_TIMEOUT_S = 120.0
_CHECKS_PER_TIMEOUT = 8
# OpenMP threads that spin while they wait take the cores that the API process needs. With one loaded neighbor on two
# cores, spinning made a forward 5 to 40 times slower. TOKENIZERS_PARALLELISM: the engine tokenizes only check texts.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class EngineStartError(InferctlError):
    """The engine process ended. If it gave a reason, the message, hint and exit code are those of its error."""

    def __init__(self, message: str, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class Listener(Protocol):
    """Receives the events of one engine, on the event loop."""

    def engine_ready(self, info: EngineInfo) -> None:
        """The engine accepts batches from now on."""

    def engine_lost(self) -> None:
        """The engine process ended. The batches in flight are lost."""

    def batch_done(self, result: BatchResult) -> None:
        """A batch completed."""

    def batch_failed(self, number: int, message: str, out_of_memory: bool) -> None:
        """A batch raised. The engine still runs."""


class Supervisor:
    """Keeps one engine process running.

    `failures` counts failed starts in a row, `restarts` all starts but the first. `batch_timeout()` returns the seconds
    after which a batch counts as hung. `essential`: a failure of the first start raises instead of a retry.
    """

    def __init__(
        self,
        config: EngineConfig,
        listener: Listener,
        batch_timeout: Callable[[], float] = lambda: 60.0,
        *,
        essential: bool = True,
    ) -> None:
        self.restarts = self.failures = self.hangs = 0
        self.pid: int | None = None
        self._config, self._listener, self._essential = config, listener, essential
        self._batch_timeout = batch_timeout
        self._writer: asyncio.StreamWriter | None = None
        self._stopping = asyncio.Event()
        self._ready = False  # this process has been ready
        self._batches: dict[int, float] = {}  # batches in flight, the oldest first: when each was sent
        self._started = 0.0  # when this process was started
        self._first_start_s: float | None = None  # seconds of the first successful start
        self._last_info: dict[str, Any] | None = None

    @property
    def crash_looping(self) -> bool:
        """Whether the last `_CRASH_LOOP_STARTS` starts failed, or more."""
        return self.failures >= _CRASH_LOOP_STARTS

    def send(self, batch: Batch) -> None:
        """Send a batch to the engine, which must be ready."""
        assert self._writer is not None
        self._batches[batch.id] = asyncio.get_running_loop().time()
        self._writer.write(frames.pack_batch(batch))

    async def run(self) -> None:
        """Keep the engine running until `stop`. Raises `EngineStartError` if an essential first start fails."""
        while not self._stopping.is_set():
            error = await self._run_process()
            if not self._stopping.is_set():
                self.failures = 0 if self._ready else self.failures + 1
                self.restarts += 1
            self._listener.engine_lost()
            if self._stopping.is_set():
                return
            if self._first_start_s is None and self._essential:
                raise error
            pause = min(_MIN_PAUSE_S * 2 ** min(self.failures, 10), _MAX_PAUSE_S)
            log.error("%s; restarting the engine in %.2g s", error.message, pause)
            try:
                await asyncio.wait_for(self._stopping.wait(), pause)
            except TimeoutError:
                continue

    def stop(self) -> None:
        """Let the engine end. `run` returns soon after."""
        self._stopping.set()
        if self._writer is not None:
            self._writer.close()

    def kill(self) -> None:
        """Kill the engine process. `run` starts another."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def _run_process(self) -> EngineStartError:
        """Run one engine process until it ends, and return why it ended."""
        self._ready, self._started = False, asyncio.get_running_loop().time()
        self._batches.clear()
        parent_socket, child_socket = socket.socketpair()
        with child_socket:
            try:
                process = await self._spawn(child_socket)
            except OSError as error:
                parent_socket.close()
                return EngineStartError(f"cannot start the engine process: {error}", None, 1)
        self.pid = process.pid
        watchdog = asyncio.create_task(self._watch(process))
        try:
            reader, self._writer = await asyncio.open_connection(sock=parent_socket, limit=1 << 24)
            config = replace(self._config, previous_info=self._last_info)
            self._writer.write(frames.pack_json(Kind.CONFIG, asdict(config)))
            if self._stopping.is_set():  # `stop` was called before there was a writer to close
                self._writer.close()
            fatal = await self._listen(reader)
        finally:
            watchdog.cancel()
            if self._writer is not None:
                self._writer.close()
            # An engine that is still loading has no work to finish.
            code = await _reap(process, 0 if self._stopping.is_set() and not self._ready else _STOP_TIMEOUT_S)
            self.pid, self._writer = None, None
        return fatal or EngineStartError(
            f"the engine process ended unexpectedly ({_exit_reason(code)})", "see the engine log above", 1
        )

    async def _spawn(self, child_socket: socket.socket) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "inferctl.serve.engine_process.worker",
            str(child_socket.fileno()),
            pass_fds=(child_socket.fileno(),),
            env=_ENVIRONMENT | os.environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=2,  # output of libraries must not appear on the server's stdout
        )

    async def _listen(self, reader: asyncio.StreamReader) -> EngineStartError | None:
        """Pass frames from the engine to the listener until it ends. Return its error if it cannot start."""
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
                self._first_start_s = self._first_start_s or loop.time() - self._started
                self._last_info = json.loads(body)
                self._listener.engine_ready(EngineInfo.from_json(self._last_info))
            elif kind is Kind.FATAL:
                fatal = json.loads(body)
                return EngineStartError(fatal["message"], fatal["hint"], fatal["exit_code"])
        return None

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill the engine if a batch, or a start after the first, takes too long."""
        loop = asyncio.get_running_loop()
        while (limit := self._timeout()) is None or loop.time() - self._waiting_since() <= limit:
            await asyncio.sleep(max(0.01, self._batch_timeout() / _CHECKS_PER_TIMEOUT))
        self.hangs += 1
        log.error("the engine did not respond for %.3g s; killing it", limit)
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    def _timeout(self) -> float | None:
        """Return the seconds that the current batch or start may take; None for no limit."""
        if self._ready:
            return self._batch_timeout() if self._batches else None
        return self._first_start_s and max(_MIN_START_TIMEOUT_S, _START_TIMEOUT_FACTOR * self._first_start_s)

    def _waiting_since(self) -> float:
        """Return when the oldest batch in flight was sent, or when the process was started if there is none."""
        return next(iter(self._batches.values()), self._started)


async def _reap(process: asyncio.subprocess.Process, timeout: float) -> int:
    """Wait for a process to end, kill it after `timeout` seconds, and return its exit code."""
    try:
        return await asyncio.wait_for(process.wait(), timeout)
    except (TimeoutError, asyncio.CancelledError):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return await process.wait()


def _exit_reason(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
