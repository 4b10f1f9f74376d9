"""One supervised process: real children that become ready, fail, hang and are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from inferctl.core.errors import InferctlError
from inferctl.serve import child
from inferctl.serve.child import Child
from tests.processes import until

SLEEP = "import time; time.sleep(600)"
READY = f"print('ready', flush=True); {SLEEP}"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY}"
PARENT = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid, flush=True); {SLEEP}"


class Python(Child):
    """Runs one program after the other, the last one again and again. A line of its output says that it is ready."""

    name = "the program"
    ends_within = 0.2, 0.2

    def __init__(self, *programs: str) -> None:
        super().__init__(self._tell)
        self.told: list[str] = []
        self.pids: list[int] = []
        self.lines: list[bytes] = []
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
        stopped = asyncio.create_task(self.stopping.wait())
        while not self.stopping.is_set():
            reading = asyncio.create_task(self._process.stdout.readline())
            await asyncio.wait((reading, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() or not reading.result():
                reading.cancel()
                break
            self.lines.append(reading.result())
            self.is_ready()
            self.changed.set()
        stopped.cancel()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await self.changed.wait()
                self.changed.clear()

    def stop(self) -> None:
        self.stopping.set()
        if self._process and self._process.returncode is None:
            self._process.terminate()


def run(found: Callable[[], Python], act: Callable[[Python], object]) -> Python:
    """Run a child until `act` is done with it and stopped it."""

    async def whole() -> Python:
        python = found()
        running = asyncio.create_task(python.run())
        await act(python)  # type: ignore[misc]
        python.stop()
        async with asyncio.timeout(60):
            await running
            assert python._process and python._process.stdout
            await python._process.stdout.read()  # to its end, which is that of its children
        return python

    return asyncio.run(whole())


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


async def ready(python: Python) -> None:
    await python.until(lambda: python.ready)


async def killed(python: Python) -> None:
    await ready(python)
    os.kill(python.pids[0], signal.SIGKILL)
    await python.until(lambda: len(python.told) == 1 and python.ready)


async def hung(python: Python) -> None:
    await ready(python)
    os.kill(python.pids[0], signal.SIGSTOP)
    python.expect(0.1)
    await python.until(lambda: len(python.told) == 2 and python.ready)


async def failing(python: Python) -> None:
    await ready(python)
    os.kill(python.pids[0], signal.SIGKILL)
    await python.until(lambda: len(python.told) == 4 and python.ready)


async def paused(python: Python) -> None:
    await ready(python)
    os.kill(python.pids[0], signal.SIGKILL)
    await python.until(lambda: len(python.told) == 1)  # it waits for a pause of many seconds


@pytest.mark.parametrize(
    ("programs", "act", "said", "restarts", "hangs"),
    [
        ((READY,), ready, [], 0, 0),
        ((STUBBORN,), ready, [], 0, 0),
        ((READY,), killed, ["was killed by signal 9; starting it again in 0.01 s"], 1, 0),
        (
            (READY,),
            hung,
            ["did not respond within 0.1 s; killing it", "was killed by signal 9; starting it again in 0.01 s"],
            1,
            1,
        ),
        (
            (READY, "raise SystemExit(3)", "", "raise SystemExit(4)", READY),
            failing,
            [
                "was killed by signal 9; starting it again in 0.01 s",
                "ended with exit code 3; starting it again in 0.02 s",
                "cannot be started: no descriptors are left; starting it again in 0.04 s",
                "ended with exit code 4; starting it again in 0.05 s",
            ],
            4,
            0,
        ),
    ],
)
def test_a_child_is_started_again_until_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
    programs: tuple[str, ...],
    act: Callable[[Python], object],
    said: list[str],
    restarts: int,
    hangs: int,
) -> None:
    monkeypatch.setattr(child, "_MIN_PAUSE_S", 0.01)
    monkeypatch.setattr(child, "_MAX_PAUSE_S", 0.05)
    found = run(lambda: Python(*programs), act)
    assert found.told == [f"the program {line}" for line in said]
    assert (found.restarts, found.hangs, found.failures, found.ready) == (restarts, hangs, 0, False)
    assert all(map(gone, found.pids))


def test_a_stop_ends_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_MIN_PAUSE_S", 600.0)
    monkeypatch.setattr(child, "_MAX_PAUSE_S", 600.0)
    assert len(run(lambda: Python(READY), paused).pids) == 1


def test_starts_that_fail_again_and_again_are_a_crash_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_MAX_PAUSE_S", 0.01)
    seen: list[tuple[int, bool]] = []

    async def looping(python: Python) -> None:
        await python.until(lambda: bool(seen.append((python.failures, python.crash_looping))) or python.failures == 5)

    run(lambda: Python(READY, "raise SystemExit(1)"), lambda python: _killed_then(python, looping))
    assert set(seen) >= {(4, False), (5, True)}


async def _killed_then(python: Python, act: Callable[[Python], object]) -> None:
    await ready(python)
    os.kill(python.pids[0], signal.SIGKILL)
    await act(python)  # type: ignore[misc]


def test_a_first_start_that_fails_is_raised() -> None:
    async def start() -> None:
        await Python("raise SystemExit(1)").run()

    with pytest.raises(InferctlError, match="the program ended with exit code 1"):
        asyncio.run(start())


def test_the_children_of_a_child_end_with_it() -> None:
    found = run(lambda: Python(PARENT), ready)
    until(lambda: gone(int(found.lines[0])))


def test_a_timer_that_is_late_kills_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that was paused: nothing of what the process sent was read."""

    async def late(python: Python) -> None:
        await ready(python)
        loop = asyncio.get_running_loop()
        python.expect(0.1)
        monkeypatch.setattr(child, "_LATE_S", -1.0)  # each timer counts as late
        await asyncio.sleep(0)
        end = loop.time() + 0.5
        loop.call_at(end, python.changed.set)
        await python.until(lambda: loop.time() >= end)

    assert run(lambda: Python(READY), late).hangs == 0
