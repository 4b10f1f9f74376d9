"""Servers that a benchmark starts for itself: `python -m inferctl serve` as a child process, from its start to its certain end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from inferctl.bench.load.target import Target, connect
from inferctl.errors import InferctlError

READY_S = 300.0
DRAIN_S = 15.0
# Decides the command that serves a configuration: (precision, file to announce in) -> arguments.
Command = Callable[[str, Path], Sequence[str]]


class ServerError(InferctlError):
    """The server did not start, or did not stay. `reason` is one line, from its own error message where it gave one."""

    def __init__(self, reason: str, hint: str | None) -> None:
        super().__init__(reason, hint)
        self.reason = reason


class Server:
    """A running child server. `process.pid` leads a process group of its own."""

    def __init__(self, process: subprocess.Popen[bytes], target: Target, log: Path) -> None:
        self.process = process
        self.target = target
        self.log = log

    def check(self) -> None:
        """Raise `ServerError` when the server has ended."""
        if (code := self.process.poll()) is not None:
            raise ServerError(
                f"the server ended with exit code {code} during the run: {last_words(self.log)}",
                f"its log is {self.log}",
            )


def serve_command(model: str, name: str, spec_file: Path | None) -> Command:
    """How to serve the local folder `model`, with the settings of `spec_file` if there is one."""

    def command(precision: str, announce: Path) -> Sequence[str]:
        spec = ["--spec", str(spec_file)] if spec_file else []
        options = ["--model", model, "--name", name, "--precision", precision, "--host", "127.0.0.1", "--port", "0"]
        return [sys.executable, "-m", "inferctl", "serve", *spec, *options, "--announce", str(announce)]

    return command


@contextlib.contextmanager
def running(
    arguments: Sequence[str], announce: Path, folder: Path, waiting: Callable[[float], None]
) -> Iterator[Server]:
    """Start a server and wait until it announces itself; whatever happens, it is gone afterwards.

    `waiting` is called with the seconds passed. Raises `ServerError` with the server's own reason when it ends or takes over five minutes.
    """
    log = folder / "server.log"
    announce.unlink(missing_ok=True)
    with log.open("wb") as stream:
        # A process group of its own: Ctrl-C reaches us alone, and we end it in order.
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
    try:
        yield Server(process, connect(_ready(process, announce, log, waiting)), log)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], patience_s: float = DRAIN_S) -> None:
    """SIGTERM, then SIGKILL to the whole process group after `patience_s`, or at once when Ctrl-C comes meanwhile."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ready(process: subprocess.Popen[bytes], announce: Path, log: Path, waiting: Callable[[float], None]) -> str:
    started = time.monotonic()
    while (passed := time.monotonic() - started) < READY_S:
        if announce.is_file():
            return str(json.loads(announce.read_text())["url"])
        if (code := process.poll()) is not None:
            raise ServerError(last_words(log) or f"the server ended with exit code {code}", f"its log is {log}")
        waiting(passed)
        time.sleep(0.1)
    raise ServerError(f"the server was not ready after {READY_S:.0f} s", f"its log is {log}")


def last_words(log: Path) -> str:
    """The last `error:` line of a log, else its last line."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:300]
