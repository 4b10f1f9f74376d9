"""The API process owns the engine process: starts it, hears of its death at once, starts it again with growing pauses.

The two share a socket pair; when one side dies the other reads end of file. Batches that were with the engine are handed back to the listener.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from dataclasses import asdict
from typing import Protocol

from inferctl.errors import InferctlError
from inferctl.serve import frames
from inferctl.serve.frames import Kind
from inferctl.serve.types import Batch, BatchResult, EngineConfig, EngineInfo

log = logging.getLogger("inferctl.supervisor")

_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 30.0
# An engine that stayed up this long (seconds) has its earlier failures forgiven.
_STABLE = 60.0
# Failed starts in a row after which the whole server should be restarted from outside.
_HOPELESS = 5
_STOP_SECONDS = 5.0
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

    def batch_failed(self, number: int, message: str) -> None:
        """A batch failed; the engine is still there."""


class Supervisor:
    """Keeps one engine process alive. `info` is None while there is none that is ready."""

    def __init__(self, config: EngineConfig, listener: Listener) -> None:
        self.info: EngineInfo | None = None
        self.restarts = 0
        self.failures = 0
        self.pid: int | None = None
        self._config, self._listener = config, listener
        self._writer: asyncio.StreamWriter | None = None
        self._stopping = asyncio.Event()

    @property
    def hopeless(self) -> bool:
        """Whether the engine failed so often in a row that waiting longer is not honest."""
        return self.failures >= _HOPELESS

    def send(self, batch: Batch) -> None:
        """Hand a batch to the engine. Only while `info` is set."""
        assert self._writer is not None
        self._writer.write(frames.pack_batch(batch))

    async def run(self) -> None:
        """Keep the engine running until `stop`. Raises `EngineStartError` when the very first start fails."""
        loop, once_ready = asyncio.get_running_loop(), False
        while not self._stopping.is_set():
            started = loop.time()
            problem = await self._live()
            was_ready = self.info is not None
            once_ready |= was_ready
            self.info, self.pid, self._writer = None, None, None
            self._listener.engine_lost()
            if self._stopping.is_set():
                return
            if not once_ready:
                raise problem
            self.failures = 1 if was_ready and loop.time() - started > _STABLE else self.failures + 1
            self.restarts += 1
            pause = min(_FIRST_PAUSE * 2 ** (self.failures - 1), _LONGEST_PAUSE)
            log.error("%s; starting it again in %.2g s (failure %d in a row)", problem.message, pause, self.failures)
            try:
                await asyncio.wait_for(self._stopping.wait(), pause)
            except TimeoutError:
                continue

    def stop(self) -> None:
        """Let the engine end; `run` returns soon after."""
        self._stopping.set()
        if self._writer is not None:
            self._writer.close()

    async def _live(self) -> EngineStartError:
        """One life of the engine process, from start to death; returns why it ended."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "inferctl.serve.worker",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                env=_ENVIRONMENT | os.environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # whatever a library prints must not end up in the server's stdout
            )
        self.pid = process.pid
        try:
            reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
            self._writer.write(frames.pack_json(Kind.CONFIG, asdict(self._config)))
            problem = await self._listen(reader)
        finally:
            if self._writer is not None:
                self._writer.close()
            code = await _reap(process)
        return problem or EngineStartError(
            f"the engine process ended unexpectedly ({_ending(code)})", "its last words are above", 1
        )

    async def _listen(self, reader: asyncio.StreamReader) -> EngineStartError | None:
        while (frame := await frames.receive_async(reader)) is not None:
            kind, body = frame
            if kind is Kind.RESULT:
                self._listener.batch_done(frames.unpack_result(body))
            elif kind is Kind.FAILED:
                failed = json.loads(body)
                self._listener.batch_failed(failed["id"], failed["message"])
            elif kind is Kind.READY:
                self.info = EngineInfo.from_json(json.loads(body))
                self._listener.engine_ready(self.info)
            elif kind is Kind.FATAL:
                fatal = json.loads(body)
                return EngineStartError(fatal["message"], fatal["hint"], fatal["exit_code"])
        return None


async def _reap(process: asyncio.subprocess.Process) -> int:
    try:
        return await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    except (TimeoutError, asyncio.CancelledError):
        process.kill()
        return await process.wait()


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
