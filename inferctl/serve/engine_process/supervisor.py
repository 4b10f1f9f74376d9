"""Starts an engine process from the API process, detects its end at once, and restarts it.

The two processes share a socket pair; if one ends, the other reads end of file. The listener then requeues the batches
in flight. An engine that takes too long for a batch is killed and restarted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from inferctl.core.errors import InferctlError
from inferctl.models.model import ModelFolder
from inferctl.serve.child import Child
from inferctl.serve.engine_process import engine_frames, memory
from inferctl.serve.engine_process.engine_frames import Kind
from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig, EngineInfo, Listener

log = logging.getLogger("inferctl.supervisor")

# A restarted engine is killed if its load takes more than this many times the first load and more than these seconds.
_START_TIMEOUT_FACTOR = 5.0
_MIN_START_TIMEOUT_S = 120.0
# A batch for idle cores has so many times as long as others: if no core is idle, it gets 0.3% of one.
_IDLE_TIMEOUT_FACTOR = 20.0
# OpenMP threads that spin while they wait take the cores that the API process needs. With one loaded neighbor on two
# cores, spinning made a forward 5 to 40 times slower. TOKENIZERS_PARALLELISM: the engine tokenizes only check texts.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class EngineStartError(InferctlError):
    """The engine process ended. If it gave a reason, the message, hint and exit code are those of its error."""

    def __init__(self, message: str, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class EngineSupervisor(Child):
    """Keeps one engine process running. It is the `EngineProcess` of its listener.

    `batch_timeout()` returns the seconds after which a batch counts as hung. `on_ready` is called after each start.
    `ready`: whether the engine accepts batches.
    """

    name = "the engine process"
    ends_within = 5.0, 0.5  # at the end of the server, nothing needs the engine

    def __init__(
        self,
        config: EngineConfig,
        listener: Listener,
        batch_timeout: Callable[[], float],
        on_ready: Callable[[EngineInfo], None],
        on_phase: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(log.error)
        self._config, self._listener, self._batch_timeout = config, listener, batch_timeout
        self._on_ready, self._on_phase = on_ready, on_phase
        self._writer: asyncio.StreamWriter | None = None
        self._batches: dict[int, float] = {}  # batches in flight, and from when on their time counts
        self._started = 0.0  # when this process was started
        self._start_timeout_s = math.inf  # unknown until the first start succeeded

    @property
    def restartable(self) -> bool:
        """Whether this engine, or the first one of the server, was ready."""
        return self._config.previous_info is not None

    def send(self, batch: Batch) -> None:
        """Send a batch to the engine. Part of `EngineProcess`."""
        assert self._writer is not None
        if not self._writer.is_closing():  # else the engine ended in this turn of the event loop
            more_s = (_IDLE_TIMEOUT_FACTOR - 1) * self._batch_timeout() if batch.idle else 0.0
            self._batches[batch.id] = asyncio.get_running_loop().time() + more_s
            self._writer.write(engine_frames.pack_batch(batch))
            self._set_kill_timer()

    def stop(self) -> None:
        """Let the engine end. `run` returns soon after."""
        self.stopping.set()
        if self._writer is not None:
            self._writer.transport.abort()

    def kill(self) -> None:
        """Kill the engine process."""
        super().kill()
        if self._writer is not None:
            self._writer.transport.abort()  # `_listen` then ends at once, also if the process does not

    async def _start(self) -> asyncio.subprocess.Process:
        self._started = asyncio.get_running_loop().time()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # imports no Python files of the current folder, which may be that of the model
                    "-m",
                    "inferctl.serve.engine_process.engine_main",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    env=_ENVIRONMENT | os.environ,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # output of libraries must not appear on the server's stdout
                    # Ctrl-C in a terminal is for the server, also while the engine imports. Not a new session: without
                    # cgroups, Linux shares cores between sessions, so one would get them for batches in idle time.
                    preexec_fn=os.setpgrp,
                )
            self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        except OSError:
            ours.close()
            raise
        return process

    async def _attend(self) -> EngineStartError | None:
        """Pass frames from the engine to the listener until it ends. Return its error if it cannot start."""
        assert self._writer is not None
        self._writer.write(engine_frames.pack_json(Kind.CONFIG, asdict(self._config)))
        self._set_kill_timer()
        # `stop` can be called before there is a writer to close.
        while not self.stopping.is_set() and (frame := await engine_frames.receive_async(self._reader)) is not None:
            kind, body = frame
            if kind is Kind.RESULT:
                result = engine_frames.unpack_result(body)
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

    async def _left(self, was_ready: bool) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
        self._batches.clear()
        # The process may take seconds to end, or not end at all, but it returns no more results.
        if was_ready:
            self._listener.engine_lost(self)

    def _failure(self, how: str, code: int | None) -> EngineStartError:
        message = f"{self.name} {how}"
        if how.startswith("was killed because"):  # of its memory
            return EngineStartError(message, memory.hint(ModelFolder(Path(self._config.model))), 3)
        return EngineStartError(message, "see the engine log above", 1)

    def _engine_ready(self, info: EngineInfo) -> None:
        if self._start_timeout_s == math.inf:
            seconds = asyncio.get_running_loop().time() - self._started
            self._start_timeout_s = max(_MIN_START_TIMEOUT_S, _START_TIMEOUT_FACTOR * seconds)
        self._config = replace(self._config, previous_info=info.to_json())
        self.is_ready()
        self._listener.engine_ready(self, info)
        self._on_ready(info)

    def _set_kill_timer(self) -> None:
        """Set when the engine is killed: if a batch, or a start after the first, takes too long."""
        if self._batches:
            self.expect(self._batch_timeout(), min(self._batches.values()))
        else:
            self.expect(math.inf if self.ready else self._start_timeout_s, self._started)
