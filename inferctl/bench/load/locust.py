"""Locust's processes: one, or a master with its workers. Locust is never imported (it patches the process that it is in)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from inferctl import assets
from inferctl.bench.load.child_server import last_words
from inferctl.bench.plan.plan import Load
from inferctl.errors import InferctlError

LOAD_FILE = "INFERCTL_LOAD_FILE"
# Headers of the requests, as JSON: a variable, since files stay and command lines are seen by all.
HEADERS = "INFERCTL_LOAD_HEADERS"
# How long a run waits for its workers to come.
WORKERS_S = 300
_PORT_S = 60.0
# How long the master may take to send its workers home: Locust waits half a second for their last words.
_QUIT_S = 3.0


class Processes:
    """The processes of one load, in a folder that holds their logs. The first one decides when the load ends.

    `remote`: it has workers on other machines. `headers` go with each request.
    """

    def __init__(self, folder: Path, remote: bool = False, headers: Mapping[str, str] | None = None) -> None:
        self._headers = json.dumps(dict(headers or {}))
        self.log = folder / "locust.log"
        self._folder, self._remote = folder, remote
        self._all: list[subprocess.Popen[bytes]] = []

    def start(self, arguments: Sequence[str], description: Path) -> None:
        """Another process; its output goes into locust.log, that of workers into locust-1.log and so on."""
        environment = clean_environment() | {LOAD_FILE: str(description), HEADERS: self._headers}
        with self._log_of(len(self._all)).open("wb") as stream:
            self._all.append(
                subprocess.Popen(
                    arguments,
                    env=environment,
                    cwd=self._folder,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def running(self) -> bool:
        """Whether the load goes on: the first process runs and no other one has failed."""
        return self._all[0].poll() is None and not self.problem()

    def alive(self) -> list[int]:
        """Ids of the processes that still run."""
        return [process.pid for process in self._all if process.poll() is None]

    def wait(self, seconds: float) -> None:
        """At most so long, and no longer than the first process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._all[0].wait(seconds)

    def problem(self) -> str | None:
        """Why a process ended that should not have, in one line; of two the one that ended the other."""
        for number, process in sorted(enumerate(self._all), reverse=True):
            if code := process.poll():
                name = "Locust" if len(self._all) == 1 else f"load worker {number}" if number else "Locust's master"
                how = f"was killed (signal {-code})" if code < 0 else f"ended with exit code {code}"
                words = last_words(self._log_of(number))
                return f"{name} {how}" + (f": {words}" if words and code > 0 else "")
        return None

    def end(self) -> None:
        """Kill what still runs; workers on other machines are told to quit first, since nothing else would tell them."""
        alive = [process for process in self._all if process.poll() is None]
        if self._remote and self._all[0] in alive:
            self._all[0].terminate()
            self.wait(_QUIT_S)
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in alive:
            process.wait()
            process.returncode = 0  # our doing, and no problem of its own

    def _log_of(self, number: int) -> Path:
        return self._folder / f"locust-{number}.log" if number else self.log


@contextlib.contextmanager
def processes(
    load: Load, description: Path, folder: Path, headers: Mapping[str, str] | None = None
) -> Iterator[Processes]:
    """Start what `load` needs; nothing of it runs any more at the end. Raises `InferctlError` when the master does not come up."""
    made = Processes(folder, bool(load.remote_workers), headers)
    try:
        if load.workers == 1 and not load.remote_workers:
            made.start(command(_users(load)), description)
        else:
            made.start(command(_users(load), _master(load)), description)
            port = _port(made, folder)
            for _ in range(load.workers):
                made.start(worker_command("127.0.0.1", port), description)
        yield made
        # Workers leave a moment after the master.
        deadline = time.monotonic() + 5
        while made.problem() is None and time.monotonic() < deadline and any(made.alive()):
            time.sleep(0.02)
    finally:
        made.end()


def clean_environment() -> dict[str, str]:
    """Ours without what would change a load: Locust takes options from LOCUST_* variables."""
    own = (LOAD_FILE, HEADERS)
    return {key: value for key, value in os.environ.items() if not key.startswith("LOCUST_") and key not in own}


def command(users: int, more: Sequence[str] = ()) -> list[str]:
    """How Locust is started; our own file ends the run, so it gets no run time."""
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


def worker_command(host: str, port: int) -> list[str]:
    """How a worker is started, for a master at `host`."""
    master = ["--master-host", host, "--master-port", str(port)]
    # Requests that failed are in the records; they are no failure of the worker.
    return [*_locust(), "--worker", *master, "--exit-code-on-error", "0", "--loglevel", "WARNING"]


def _locust() -> list[str]:
    return [sys.executable, "-m", "locust", "-f", str(assets.root() / "benchmarks" / "locustfile.py")]


def _users(load: Load) -> int:
    return load.peak_users if load.mode == "closed" else load.workers + load.remote_workers


def _master(load: Load) -> list[str]:
    workers = load.workers + load.remote_workers
    host, port = ("*", load.master_port) if load.remote_workers else ("127.0.0.1", 0)
    expected = ["--expect-workers", str(workers), "--expect-workers-max-wait", str(WORKERS_S)]
    return ["--master", "--master-bind-host", host, "--master-bind-port", str(port), *expected]


def _port(made: Processes, folder: Path) -> int:
    """The port on which the master listens: it says so when it is up."""
    deadline = time.monotonic() + _PORT_S
    while made.running() and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads((folder / "master.json").read_text())["port"])
        time.sleep(0.05)
    raise InferctlError(
        f"Locust's master did not start: {made.problem() or last_words(made.log)}", f"its log is {made.log}"
    )
