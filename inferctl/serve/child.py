"""One process that a server starts, watches, ends, and starts again with growing pauses.

start -> attend, ready at some time -> left -> reap -> pause -> start
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from inferctl.core.cgroup import MemoryKills
from inferctl.core.errors import InferctlError, NotReadyError

_MIN_PAUSE_S, _MAX_PAUSE_S = 0.25, 30.0
_KILLED_S = 5.0  # to end after SIGKILL
# A timer that is later than this did not run in time, as in a paused container, and then the process was not heard.
_LATE_S = 0.5
_STABLE_S = 30.0  # after this, the next crash of a helper is a new one


class Child:
    """A process that is kept running. Subclasses say how it starts and what is done with it.

    `ready`: set by `is_ready`. `was_ready`: whether it ever was. `failures`: how many starts in a row did not become
    ready. `restarts`: all starts but the first. `hangs`: how often it was killed because it did not respond.
    `stopping`: set it to let `run` return after the process. `report` gets a line for each restart and kill.
    """

    name = "a process"
    crash_loop_starts = 5  # after so many failures, the whole server should be restarted from outside
    ends_within = 5.0, 5.0  # seconds that it has to end by itself: when it is replaced, and when it is stopped

    def __init__(self, report: Callable[[str], None]) -> None:
        self.ready = self.was_ready = False
        self.failures = self.restarts = self.hangs = 0
        self.stopping = asyncio.Event()
        self._report = report
        self._process: asyncio.subprocess.Process | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def _start(self) -> asyncio.subprocess.Process:
        """Start the process, as the leader of a session of its own. `OSError`: it cannot be started."""
        raise NotImplementedError

    async def _attend(self) -> InferctlError | None:
        """Return when the process ended or is not usable any more, and why, if that is known."""
        raise NotImplementedError

    async def _left(self, was_ready: bool) -> None:
        """Do what follows the end of `_attend`. The process may still run."""

    def _failure(self, how: str, code: int | None) -> InferctlError:
        """Return why the process ended. `how`: what happened to it. `code`: as in `subprocess`, None without one."""
        return NotReadyError(f"{self.name} {how}", "see the log above")

    @property
    def restartable(self) -> bool:
        """Whether it is started again after a start that failed."""
        return self.was_ready

    @property
    def crash_looping(self) -> bool:
        """Whether it failed to start again and again."""
        return self.failures >= self.crash_loop_starts

    def is_ready(self) -> None:
        """Note that the start succeeded."""
        self.ready, self.was_ready, self.failures = True, True, 0

    async def run(self) -> None:
        """Keep the process running until it is stopped. Raises why it cannot start, if it is not `restartable`."""
        while not self.stopping.is_set():
            error = await self._run_once()
            if self.stopping.is_set():
                break
            if not self.restartable:
                raise error
            self.restarts += 1
            pause = min(_MIN_PAUSE_S * 2 ** min(self.failures, 10), _MAX_PAUSE_S)
            self._report(f"{error.message}; starting it again in {pause:.2g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), pause)
        self.expect(math.inf)

    async def _run_once(self) -> InferctlError:
        """Run one process until it ends, and return why."""
        kills = MemoryKills()
        self._process = error = None
        try:
            self._process = await self._start()
            error = await self._attend()
        except OSError as problem:  # no memory or descriptors are left
            return self._failure(f"cannot be started: {problem}", None)
        finally:
            was_ready, self.ready = self.ready, False
            self.failures += not was_ready
            self.expect(math.inf)
            await self._left(was_ready)
            how, code = await self._reap(self.ends_within[self.stopping.is_set()])
        if code == -signal.SIGKILL and (why := kills.text()):
            how = f"was {why}"
        return error or self._failure(how, code)

    async def _reap(self, seconds: float) -> tuple[str, int | None]:
        """Wait for the process to end, kill it after `seconds`, and return how it ended. Its children end too."""
        process = self._process
        if process is None:
            return "was not started", None
        for limit in (seconds, _KILLED_S):
            with contextlib.suppress(TimeoutError):
                code = await asyncio.wait_for(process.wait(), limit)
                _kill_group(process.pid)
                return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}", code
            self.kill()
        return "is still there after SIGKILL", None

    def kill(self) -> None:
        """Kill the process and its children."""
        if self._process is not None and self._process.returncode is None:
            _kill_group(self._process.pid)

    def expect(self, seconds: float, since: float | None = None, what: str = "respond") -> None:
        """Kill the process `seconds` after `since` (None: now), unless this is called again before that.

        `since`: of the clock of the event loop. `what`: what the process is expected to do.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds < math.inf:
            loop = asyncio.get_running_loop()
            due = max(loop.time(), (loop.time() if since is None else since) + seconds)
            self._timer = loop.call_at(due, self._hung, due, seconds, what)

    def _hung(self, due: float, seconds: float, what: str) -> None:
        if asyncio.get_running_loop().time() - due > _LATE_S:
            self.expect(seconds, what=what)
            return
        self.hangs += 1
        self._report(f"{self.name} did not {what} within {seconds:.3g} s; killing it")
        self.kill()


class Helper(Child):
    """A program of inferctl that works next to a server, and ends with its stdin. Its stderr goes to a log.

    It gets `settings` as a line of JSON. An empty line before the end says that the server ends, and was not killed.
    """

    restartable = True

    def __init__(self, name: str, module: str, settings: dict[str, Any], log: logging.Logger) -> None:
        super().__init__(log.error)
        self.name, self._module, self._log = name, module, log
        self._line = json.dumps(settings).encode() + b"\n"

    def stop(self, seconds: float, what: str) -> None:
        """Let the program do `what` is left, and `run` return after `seconds` at the latest."""
        self.stopping.set()
        self._end()
        self.expect(seconds, what=what)

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for the server only
        )

    async def _attend(self) -> None:
        process = self._process
        assert process and process.stdin and process.stderr
        process.stdin.write(self._line)
        if self.stopping.is_set():
            self._end()
        stable = asyncio.get_running_loop().call_later(_STABLE_S, self.is_ready)
        with contextlib.suppress(ConnectionError, ValueError):  # a line that is too long
            async for line in process.stderr:
                self._log.warning("%s", line.decode(errors="replace").rstrip())
        stable.cancel()
        await process.wait()

    def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin
            self._process.stdin.write(b"\n")
            self._process.stdin.close()


def end_with_parent(seconds: float, end: Callable[[], None]) -> None:
    """Call `end` some seconds after the parent of this process was killed, also if the event loop is blocked."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(seconds)
        end()

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
