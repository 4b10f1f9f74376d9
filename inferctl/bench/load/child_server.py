"""Start and stop servers for a benchmark: each one is `python -m inferctl serve` in a child process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from inferctl.bench.load.target import ServerConnection, connect
from inferctl.config import settings
from inferctl.core.errors import InferctlError

# vLLM takes minutes to start: it loads and compiles the model.
READY_S = 900.0
DRAIN_S = 15.0
# Returns the command that serves a configuration: (precision, file for `--announce`, folder of a checkpoint to serve
# instead of the model) -> arguments.
ServeCommand = Callable[[str, Path, str | None], Sequence[str]]


class ServerError(InferctlError):
    """The server did not start, or it ended early. `reason` is one line, from the server's own error if it has one."""

    def __init__(self, reason: str, hint: str | None) -> None:
        super().__init__(reason, hint)
        self.reason = reason


class ChildServer:
    """A running child server. `process.pid` leads a process group of its own."""

    def __init__(self, process: subprocess.Popen[bytes], connection: ServerConnection, log: Path) -> None:
        self.process = process
        self.connection = connection
        self.log = log

    def check(self) -> None:
        """Raise `ServerError` if the server has ended."""
        if (code := self.process.poll()) is not None:
            raise ServerError(
                f"the server ended with exit code {code} during the run: {last_error(self.log)}",
                f"see {self.log}",
            )


def serve_command(model: str | None, name: str, spec_file: Path | None) -> ServeCommand:
    """Return a function that builds the command to serve the local folder `model`; None: the models of the spec.

    `spec_file` adds the settings of a spec.
    """

    def command(precision: str, announce: Path, checkpoint: str | None) -> Sequence[str]:
        spec = ["--spec", str(spec_file)] if spec_file else []
        options = ["--model", checkpoint or model, "--name", name] if model else []
        options += ["--precision", precision]
        address = ["--host", "127.0.0.1", "--port", "0", "--announce", str(announce)]
        return [sys.executable, "-m", "inferctl", "serve", *spec, *options, *address]

    return command


@contextlib.contextmanager
def serve(
    arguments: Sequence[str],
    announce: Path,
    folder: Path,
    on_wait: Callable[[float], None],
    variables: Mapping[str, str] | None = None,
) -> Iterator[ChildServer]:
    """Start a server, wait until it announces its URL, and yield it. The server has ended when the context ends.

    `on_wait` receives the seconds since the start. `variables` are added to the environment. Raises `ServerError` with
    the server's own reason if the server ends, or after 15 minutes.
    """
    log = folder / "server.log"
    announce.unlink(missing_ok=True)
    with log.open("wb") as stream:
        # In its own process group, the server does not receive Ctrl-C. The `finally` below ends it in an orderly way.
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | settings.OPEN_ACCESS | dict(variables or {}),
            start_new_session=True,
        )
    try:
        yield ChildServer(process, connect(_ready(process, announce, log, on_wait)), log)
    finally:
        stop(process)


@contextlib.contextmanager
def serve_folder(model: Path, name: str, precision: str, spec_file: Path | None = None) -> Iterator[ServerConnection]:
    """Start a server of a model folder, without a folder for its files, and yield its connection.

    Raises `InferctlError` if it does not start.
    """
    command = serve_command(str(model.resolve()), name, spec_file.resolve() if spec_file else None)
    with tempfile.TemporaryDirectory(prefix="inferctl-") as work:
        announce = Path(work) / "server.json"
        try:
            with serve(command(precision, announce, None), announce, Path(work), lambda _: None) as server:
                yield server.connection
        except ServerError as error:
            hint = f"see its log: `inferctl serve --model {model}`"
            raise InferctlError(f"the server did not start: {error.reason}", hint) from None


def stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, and SIGKILL to the whole process group after `DRAIN_S`, or at once on Ctrl-C."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DRAIN_S)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ready(process: subprocess.Popen[bytes], announce: Path, log: Path, on_wait: Callable[[float], None]) -> str:
    started = time.monotonic()
    while (elapsed_s := time.monotonic() - started) < READY_S:
        if announce.is_file():
            return str(json.loads(announce.read_text())["url"])
        if (code := process.poll()) is not None:
            raise ServerError(last_error(log) or f"the server ended with exit code {code}", f"see {log}")
        on_wait(elapsed_s)
        time.sleep(0.1)
    raise ServerError(f"the server was not ready after {READY_S:.0f} s", f"see {log}")


def last_error(log: Path) -> str:
    """Return the last `error:` line of a log, or its last line if there is none."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:300]
