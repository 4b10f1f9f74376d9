"""Start and stop Locust's processes: one process, or a master with workers.

Locust is never imported, because it patches the process that imports it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from inferctl.bench.load.child_server import last_error
from inferctl.bench.plan.shape import Load
from inferctl.core import assets
from inferctl.core.errors import InferctlError

LOAD_FILE = "INFERCTL_LOAD_FILE"
# The headers of the requests, as JSON. Files persist and all users can read command lines, so a variable holds them.
HEADERS = "INFERCTL_LOAD_HEADERS"
# How long a run waits until all workers are connected.
_WORKERS_S = 300
_PORT_S = 60.0
# Exit codes of a process that cannot write a file (`exit_on_write_error` in inferctl/bench/loadgen/recorder.py).
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# gevent looks for plugins in all installed packages for each module that it patches: with 290 packages, half of the
# start. The load generator uses gevent directly. A master waits for its workers with the patched `time.sleep`.
_UNPATCHED = {"LOCUST_SKIP_MONKEY_PATCH": "1"}


class Processes:
    """The processes of one load. `folder` receives their logs. The load ends with the first process.

    `headers` are sent with each request.
    """

    def __init__(self, folder: Path, headers: Mapping[str, str] | None = None) -> None:
        self._headers = json.dumps(dict(headers or {}))
        self.log = folder / "locust.log"
        self._folder = folder
        self._all: list[subprocess.Popen[bytes]] = []

    def start(self, arguments: Sequence[str], description: Path, variables: Mapping[str, str] | None = None) -> None:
        """Start a process. The first one logs to locust.log, the others to locust-1.log and so on.

        `variables` are added to its environment.
        """
        own = {LOAD_FILE: str(description), HEADERS: self._headers, **(variables or {})}
        with self._log_of(len(self._all)).open("wb") as stream:
            self._all.append(
                subprocess.Popen(
                    arguments,
                    env=clean_environment() | own,
                    cwd=self._folder,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def running(self) -> bool:
        """Return whether the first process is running and no other process has failed."""
        return self._all[0].poll() is None and not self.problem()

    def running_pids(self) -> list[int]:
        """Return the ids of the running processes."""
        return [process.pid for process in self._all if process.poll() is None]

    def wait(self, seconds: float) -> None:
        """Wait until the first process ends, for `seconds` at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._all[0].wait(seconds)

    def problem(self) -> str | None:
        """Return one line about a process that failed, or None.

        If several failed, it names a worker: the master fails as a consequence.
        """
        for number, process in sorted(enumerate(self._all), reverse=True):
            if code := process.poll():
                name = "Locust" if len(self._all) == 1 else f"load worker {number}" if number else "Locust's master"
                how = f"was killed (signal {-code})" if code < 0 else f"ended with exit code {code}"
                error = last_error(self._log_of(number))
                return f"{name} {how}" + (f": {error}" if error and code > 0 else "")
        return None

    def check_written(self) -> None:
        """Raise `OSError` if a process ended because it cannot write a file: this is no failure of the server."""
        for process in self._all:
            if (code := process.poll()) in _WRITE_ERRORS:
                raise OSError(code, os.strerror(code), str(self._folder))

    def end(self) -> None:
        """Kill all running processes."""
        running = [process for process in self._all if process.poll() is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in running:
            process.wait()
            process.returncode = 0  # killed on purpose: `problem` must not report it

    def _log_of(self, number: int) -> Path:
        return self._folder / f"locust-{number}.log" if number else self.log


@contextlib.contextmanager
def processes(
    load: Load, description: Path, folder: Path, headers: Mapping[str, str] | None = None
) -> Iterator[Processes]:
    """Start the processes that `load` needs. All have ended when the context ends.

    Raises `InferctlError` if the master does not start.
    """
    group = Processes(folder, headers)
    try:
        users = load.peak_users if load.mode == "closed" else load.workers
        if load.workers == 1:
            group.start(command(users), description, _UNPATCHED)
        else:
            group.start(command(users, _master(load)), description)
            port = _port(group, folder)
            for _ in range(load.workers):
                group.start(worker_command(port), description)
        yield group
        # Workers end shortly after the master.
        deadline = time.monotonic() + 5
        while group.problem() is None and time.monotonic() < deadline and any(group.running_pids()):
            time.sleep(0.02)
    finally:
        group.end()


def clean_environment() -> dict[str, str]:
    """Return the environment variables of this process, without those that configure Locust (LOCUST_*)."""
    own = (LOAD_FILE, HEADERS)
    return {key: value for key, value in os.environ.items() if not key.startswith("LOCUST_") and key not in own}


def command(users: int, more: Sequence[str] = ()) -> list[str]:
    """Return the command that starts Locust. It sets no run time: inferctl/bench/loadgen/locustfile.py ends the run."""
    options = [
        "--headless",
        "--users",
        str(users),
        "--spawn-rate",
        str(users),
        "--only-summary",
        "--exit-code-on-error",
        "0",
    ]
    return [*_locust(), *options, *more, "--loglevel", "WARNING"]


def worker_command(port: int) -> list[str]:
    """Return the command that starts a worker for the master at a port of this machine."""
    master = ["--master-host", "127.0.0.1", "--master-port", str(port)]
    # Failed requests are in the records. They must not make the worker's exit code an error.
    return [*_locust(), "--worker", *master, "--exit-code-on-error", "0", "--loglevel", "WARNING"]


def _locust() -> list[str]:
    return [sys.executable, "-m", "locust", "-f", str(assets.package() / "bench" / "loadgen" / "locustfile.py")]


def _master(load: Load) -> list[str]:
    expected = ["--expect-workers", str(load.workers), "--expect-workers-max-wait", str(_WORKERS_S)]
    return ["--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", "0", *expected]


def _port(group: Processes, folder: Path) -> int:
    """Wait until the master writes its port to master.json, and return it."""
    deadline = time.monotonic() + _PORT_S
    while group.running() and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads((folder / "master.json").read_text())["port"])
        time.sleep(0.05)
    group.check_written()
    raise InferctlError(
        f"Locust's master did not start: {group.problem() or last_error(group.log)}", f"see {group.log}"
    )
