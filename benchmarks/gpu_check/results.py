"""What a step of the GPU check writes: checks, figures and what it skipped, in a JSON file after each of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Set by `__main__.py` for each process of the check.
STAND_IN = os.environ.get("GPU_CHECK_STAND_IN") == "1"
SHORT = os.environ.get("GPU_CHECK_SHORT") == "1"
WHOLE = "the step itself"


class Step:
    """The result of one step. `left` returns the seconds until its time limit.

    `entry`: what the file says besides the checks. Its own checks are those of an earlier run: their parts are skipped.
    """

    def __init__(self, file: Path, end: float, entry: dict[str, Any] | None = None) -> None:
        self.file, self._end, self._entry = file, end, entry or {}
        self.checks: list[dict[str, Any]] = list(self._entry.get("checks", ()))
        self._kept = {check["part"] for check in self.checks}
        self.write()

    def left(self) -> float:
        return self._end - time.time()

    def check(self, name: str, passed: bool, detail: str = "", **figures: Any) -> None:
        """Record whether a check passed. `figures` are stored beside it."""
        self._add(name, "passed" if passed else "failed", detail, figures)

    def figure(self, name: str, detail: str, **figures: Any) -> None:
        """Record measured values, which nothing is expected of."""
        self._add(name, "figure", detail, figures)

    def skip(self, name: str, why: str) -> None:
        """Record what did not run, and the reason."""
        self._add(name, "skipped", why, {})

    def part(self, name: str, seconds: float, work: Callable[..., None], *arguments: Any) -> None:
        """Run `work(step, *arguments)`, unless fewer than `seconds` are left. Its error is a failed check."""
        if name in self._kept:
            return
        first = len(self.checks)
        if self.left() < seconds:
            self.skip(name, f"{self.left():.0f} s were left, it needs about {seconds:.0f}")
            return
        try:
            work(self, *arguments)
        except Exception as error:  # noqa: BLE001  # any error is the result
            traceback.print_exc()
            self.check(name, False, f"{type(error).__name__}: {str(error).strip()[:600]}")
        if name != WHOLE:
            for check in self.checks[first:]:
                check["part"] = name
            self.write()

    def _add(self, name: str, outcome: str, detail: str, figures: dict[str, Any]) -> None:
        entry = {"name": name, "outcome": outcome, "detail": detail, **figures}
        self.checks.append(entry)
        self.write()
        sys.stderr.write(f"{line(entry)}\n")

    def write(self) -> None:
        """Write the result so far."""
        write(self.file, self._entry | {"checks": self.checks})


def line(check: dict[str, Any]) -> str:
    """Return a check as a line for people."""
    return f"  {check['outcome']:8} {check['name']}" + (f": {check['detail']}" if check["detail"] else "")


def write(file: Path, data: object) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def _end_with(parent: int) -> None:
    """End this step and its servers when the process that started it is gone. They would keep the GPU busy."""
    while os.getppid() == parent:
        time.sleep(1)
    with suppress(ImportError):  # of psutil
        from inferctl.bench.load import process_usage

        for pid in process_usage.tree(os.getpid())[1:]:  # servers of benchmarks have sessions of their own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


def run(work: Callable[[Step, Any], None]) -> None:
    """Run a step: its module calls this with its function. The arguments of the process are a JSON object."""
    from inferctl.serve.engines import hide_unused_libraries

    hide_unused_libraries()
    settings = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    file = Path(settings["file"])
    Step(file, settings["end"], json.loads(file.read_text())).part(WHOLE, 0, work, settings)
