"""Starts an engine process from the API process, detects its end at once, and restarts it with growing pauses.

The two processes share a socket pair; if one ends, the other reads end of file. The listener then requeues the batches
in flight. An engine that takes too long for a batch is killed and restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from inferctl.core.cgroup import MemoryKills
from inferctl.core.errors import InferctlError
from inferctl.models.model import ModelFolder
from inferctl.serve.engine_process import frames, memory
from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig, EngineInfo, Listener
from inferctl.serve.engine_process.frames import Kind

log = logging.getLogger("inferctl.supervisor")

_MIN_PAUSE_S = 0.25
_MAX_PAUSE_S = 30.0
# After this many failed starts in a row, the whole server should be restarted from outside.
_CRASH_LOOP_STARTS = 5
_STOP_TIMEOUT_S = 5.0
_EXIT_TIMEOUT_S = 0.5  # at the end of the server, when nothing needs the engine
# A restarted engine is killed if its load takes more than this many times the first load and more than these seconds.
_START_TIMEOUT_FACTOR = 5.0
_MIN_START_TIMEOUT_S = 120.0
# OpenMP threads that spin while they wait take the cores that the API process needs. With one loaded neighbor on two
# cores, spinning made a forward 5 to 40 times slower. TOKENIZERS_PARALLELISM: the engine tokenizes only check texts.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class EngineStartError(InferctlError):
    """The engine process ended. If it gave a reason, the message, hint and exit code are those of its error."""

    def __init__(self, message: str, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class EngineSupervisor:
    """Keeps one engine process running. It is the `EngineProcess` of its listener.

    `batch_timeout()` returns the seconds after which a batch counts as hung. `on_ready` is called after each start.
    `ready`: whether the engine accepts batches. `restarts`: all starts but the first. `hangs`: how often the engine was
    killed because it did not respond.
    """

    def __init__(
        self,
        config: EngineConfig,
        listener: Listener,
        batch_timeout: Callable[[], float],
        on_ready: Callable[[EngineInfo], None],
        on_phase: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.ready = False
        self.restarts = self.hangs = 0
        self._config, self._listener, self._batch_timeout = config, listener, batch_timeout
        self._on_ready, self._on_phase = on_ready, on_phase
        self._failures = 0  # failed starts in a row
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._stopping = asyncio.Event()
        self._batches: dict[int, float] = {}  # batches in flight, the oldest first: when each was sent
        self._started = 0.0  # when this process was started
        self._start_timeout_s = math.inf  # unknown until the first start succeeded
        self._kill_timer: asyncio.TimerHandle | None = None

    @property
    def crash_looping(self) -> bool:
        """Whether the last `_CRASH_LOOP_STARTS` starts failed, or more."""
        return self._failures >= _CRASH_LOOP_STARTS

    def send(self, batch: Batch) -> None:
        """Send a batch to the engine. Part of `EngineProcess`."""
        assert self._writer is not None
        if not self._writer.is_closing():  # else the engine ended in this turn of the event loop
            self._batches[batch.id] = asyncio.get_running_loop().time()
            self._writer.write(frames.pack_batch(batch))
            self._set_kill_timer()

    async def run(self) -> None:
        """Keep the engine running until `stop`. Raises `EngineStartError` if it cannot start and none ever could."""
        while not self._stopping.is_set():
            error = await self._run_process()
            if self._stopping.is_set():
                return
            if self._config.previous_info is None:
                raise error
            self.restarts += 1
            pause = min(_MIN_PAUSE_S * 2 ** min(self._failures, 10), _MAX_PAUSE_S)
            log.error("%s; restarting the engine in %.2g s", error.message, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    def stop(self) -> None:
        """Let the engine end. `run` returns soon after."""
        self._stopping.set()
        if self._writer is not None:
            self._writer.transport.abort()

    def kill(self) -> None:
        """Kill the engine process."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _run_process(self) -> EngineStartError:
        """Run one engine process until it ends, and return why it ended."""
        self._started, kills = asyncio.get_running_loop().time(), MemoryKills()
        try:
            reader, self._writer = await self._spawn()
        except OSError as error:  # no memory or descriptors are left
            self._failures += 1
            return EngineStartError(f"cannot start the engine process: {error}", None, 1)
        assert self._process is not None
        self._writer.write(frames.pack_json(Kind.CONFIG, asdict(self._config)))
        self._set_kill_timer()
        try:
            fatal = await self._listen(reader)
        finally:
            self._writer.transport.abort()
            self._cancel_kill_timer()
            self._batches.clear()
            was_ready, self.ready = self.ready, False
            # The process may take seconds to end, or not end at all, but it returns no more results.
            if was_ready:
                self._listener.engine_lost(self)
            else:
                self._failures += 1
            how = await reap(self._process, _EXIT_TIMEOUT_S if self._stopping.is_set() else _STOP_TIMEOUT_S)
        if fatal:
            return fatal
        if how == f"signal {signal.SIGKILL:d}" and (why := kills.text()):
            return EngineStartError(
                f"the engine process was {why}", memory.hint(ModelFolder(Path(self._config.model))), 3
            )
        return EngineStartError(f"the engine process ended unexpectedly ({how})", "see the engine log above", 1)

    async def _spawn(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parent_socket, child_socket = socket.socketpair()
        try:
            with child_socket:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # imports no Python files of the current folder, which may be that of the model
                    "-m",
                    "inferctl.serve.engine_process.main",
                    str(child_socket.fileno()),
                    pass_fds=(child_socket.fileno(),),
                    env=_ENVIRONMENT | os.environ,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # output of libraries must not appear on the server's stdout
                    start_new_session=True,  # Ctrl-C in a terminal is for the server, also while the engine imports
                )
            return await asyncio.open_connection(sock=parent_socket, limit=1 << 24)
        except OSError:
            parent_socket.close()
            raise

    async def _listen(self, reader: asyncio.StreamReader) -> EngineStartError | None:
        """Pass frames from the engine to the listener until it ends. Return its error if it cannot start."""
        # `stop` can be called before there is a writer to close.
        while not self._stopping.is_set() and (frame := await frames.receive_async(reader)) is not None:
            kind, body = frame
            if kind is Kind.RESULT:
                result = frames.unpack_result(body)
                del self._batches[result.id]
                self._listener.batch_done(self, result)
            elif kind is Kind.FAILED:
                failed = json.loads(body)
                del self._batches[failed["id"]]
                self._listener.batch_failed(self, failed["id"], failed["message"], failed["out_of_memory"])
            elif kind is Kind.PHASE:
                self._on_phase(json.loads(body))
            elif kind is Kind.READY:
                self._engine_ready(EngineInfo.from_json(json.loads(body)))
            elif kind is Kind.FATAL:
                fatal = json.loads(body)
                return EngineStartError(fatal["message"], fatal["hint"], fatal["exit_code"])
            self._set_kill_timer()
        return None

    def _engine_ready(self, info: EngineInfo) -> None:
        if self._start_timeout_s == math.inf:
            seconds = asyncio.get_running_loop().time() - self._started
            self._start_timeout_s = max(_MIN_START_TIMEOUT_S, _START_TIMEOUT_FACTOR * seconds)
        self._config = replace(self._config, previous_info=info.to_json())
        self._failures, self.ready = 0, True
        self._listener.engine_ready(self, info)
        self._on_ready(info)

    def _set_kill_timer(self) -> None:
        """Set when the engine is killed: if the oldest batch, or a start after the first, takes too long."""
        self._cancel_kill_timer()
        since, limit = self._started, math.inf if self.ready else self._start_timeout_s
        if self._batches:
            since, limit = next(iter(self._batches.values())), self._batch_timeout()
        if limit < math.inf:
            self._kill_timer = asyncio.get_running_loop().call_at(since + limit, self._kill_hung, limit)

    def _cancel_kill_timer(self) -> None:
        if self._kill_timer is not None:
            self._kill_timer.cancel()

    def _kill_hung(self, limit: float) -> None:
        assert self._writer is not None
        self.hangs += 1
        log.error("the engine did not respond for %.3g s; killing it", limit)
        self.kill()
        self._writer.transport.abort()  # `_listen` then ends at once, also if the process does not


async def reap(process: asyncio.subprocess.Process, timeout: float) -> str:
    """Wait for a process to end, kill it after `timeout` seconds, and return how it ended."""
    for seconds in (timeout, _STOP_TIMEOUT_S):
        with contextlib.suppress(TimeoutError):
            code = await asyncio.wait_for(process.wait(), seconds)
            return f"signal {-code}" if code < 0 else f"exit code {code}"
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    return "still there after SIGKILL"
