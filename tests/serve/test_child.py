"""One supervised process: real children that become ready, fail, hang and are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from inferctl.serve import child
from inferctl.serve.child import Child
from tests.processes import until

SLEEP = "import time; time.sleep(600)"
READY = f"print('ready', flush=True); {SLEEP}"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY}"
PARENT = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid, flush=True); {SLEEP}"
KILLED = "was killed by signal 9; starting it again in 0.01 s"


class Python(Child):
    """Runs one program after the other, the last one again and again. A line of its output says that it is ready."""

    name = "the program"
    ends_within = 0.2, 0.2

    def __init__(self, *programs: str) -> None:
        super().__init__(self._tell)
        self.told: list[str] = []
        self.pids: list[int] = []
        self.line = b""
        self.changed = asyncio.Event()
        self._programs = list(programs)

    def _tell(self, line: str) -> None:
        self.told.append(line)
        self.changed.set()

    async def _start(self) -> asyncio.subprocess.Process:
        program = self._programs.pop(0) if len(self._programs) > 1 else self._programs[0]
        if not program:
            raise OSError("no descriptors are left")
        command = (sys.executable, "-c", program)
        found = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, start_new_session=True)
        self.pids.append(found.pid)
        return found

    async def _attend(self) -> None:
        assert self._process and self._process.stdout
        if line := await self._process.stdout.readline():
            self.line = line
            self.is_ready()
            self.changed.set()
            ends = [asyncio.ensure_future(end) for end in (self._process.wait(), self.stopping.wait())]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                end.cancel()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await self.changed.wait()
                self.changed.clear()


def run(programs: tuple[str, ...], act: Callable[[Python], Awaitable[None]]) -> Python:
    """Run a child until `act`, which is called when it is ready, is done with it. Then stop it."""

    async def whole() -> Python:
        python = Python(*programs)
        running = asyncio.create_task(python.run())
        await python.until(lambda: python.ready)
        await act(python)
        python.stopping.set()
        if python._process and python._process.returncode is None:
            python._process.terminate()
        async with asyncio.timeout(60):
            await running
            assert python._process and python._process.stdout
            await python._process.stdout.read()  # to its end, which is that of its children
        return python

    return asyncio.run(whole())


async def nothing(_: Python) -> None: ...


def killed(told: int, *, ready: bool = True) -> Callable[[Python], Awaitable[None]]:
    async def act(python: Python) -> None:
        os.kill(python.pids[0], signal.SIGKILL)
        await python.until(lambda: len(python.told) == told and python.ready is ready)

    return act


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("programs", "act", "said", "hangs"),
    [
        ((STUBBORN,), nothing, [], 0),
        (
            (READY, "raise SystemExit(3)", "", "raise SystemExit(4)", READY),
            killed(4),
            [
                KILLED,
                "ended with exit code 3; starting it again in 0.02 s",
                "cannot be started: no descriptors are left; starting it again in 0.04 s",
                "ended with exit code 4; starting it again in 0.05 s",
            ],
            0,
        ),
    ],
)
def test_a_child_is_started_again_until_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
    programs: tuple[str, ...],
    act: Callable[[Python], Awaitable[None]],
    said: list[str],
    hangs: int,
) -> None:
    monkeypatch.setattr(child, "_MIN_PAUSE_S", 0.01)
    monkeypatch.setattr(child, "_MAX_PAUSE_S", 0.05)
    found = run(programs, act)
    assert found.told == [f"the program {line}" for line in said]
    assert (found.restarts, found.hangs, found.failures, found.ready) == (len(said) - hangs, hangs, 0, False)
    assert all(map(gone, found.pids))


def test_a_stop_ends_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_MIN_PAUSE_S", 600.0)
    monkeypatch.setattr(child, "_MAX_PAUSE_S", 600.0)
    assert len(run((READY,), killed(1, ready=False)).pids) == 1


def test_the_children_of_a_child_end_with_it() -> None:
    found = run((PARENT,), nothing)
    until(lambda: gone(int(found.line)))


def test_a_timer_that_is_late_kills_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that was paused: nothing of what the process sent was read."""
    monkeypatch.setattr(child, "_LATE_S", -1.0)  # each timer counts as late

    async def late(python: Python) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + 0.5
        python.expect(0.1)
        loop.call_at(end, python.changed.set)
        await python.until(lambda: loop.time() >= end)

    assert run((READY,), late).hangs == 0
