"""The load: Locust runs it, and every request is recorded exactly. A process of its own; nothing imports it.

    INFERCTL_LOAD_FILE=load.json python -m locust -f benchmarks/locustfile.py --headless ...     (inferctl/bench/load/generator.py does)
    python -m inferctl.bench.load.worker HOST                                                         (a worker on another machine)

`load.json` says what to send:

    url           where to POST
    mode          closed: `users` clients, each sends its next request when the last one is answered.
                  open: requests leave at the times of `schedule`, whatever the server does, and latency counts from those times.
    bodies        file with one JSON request body a line; `@SERIAL@` in it becomes a number that no other request has
    order         file of uint32 (little endian): which body the n-th request takes, repeated when it ends
    schedule      open: file of uint64, nanoseconds after the start of the measurement; `warmup_schedule` likewise
    timeline      closed: stages of {duration_s, users}; empty for `users` all the time
    users, duration_s, warmup_s (at most), window_s, timeout_s, max_outstanding (open), serial, workers, remote_workers
    output        folder for what is written here

The variable INFERCTL_LOAD_HEADERS has further headers of each request, a JSON object: they may hold secrets.

Written: `requests-<worker>.bin` (a line of magic, a line of JSON that names the fields, then one fixed-size record a request: see
loadgen/recorder.py) and `state-0.json` (phase and its times, whether the warm-up settled, each worker's account of itself).

Locust starts, connects and stops the processes and spreads the users; what a user sends is in loadgen/: `generator` (what and when),
`client` (HTTP), `recorder` (records), `coordinator` (phases over all workers), `clock` (workers on other machines).

All times are CLOCK_MONOTONIC of the process that wrote them, in nanoseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import gevent
import gevent.event
from loadgen import clock
from loadgen.coordinator import Coordinator
from loadgen.generator import Generator, load_files
from loadgen.recorder import OK, Recorder
from locust import User, events, task
from locust.exception import StopUser
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

FILE = os.environ.get("INFERCTL_LOAD_FILE")
LOAD: dict[str, Any] | None = json.loads(Path(FILE).read_text()) if FILE else None
if LOAD:
    LOAD["headers"] = json.loads(os.environ.get("INFERCTL_LOAD_HEADERS", "{}"))
SEND_EVERY_S, PIECE = 1.0, 1 << 20


class Worker:
    """Ties a generator to Locust: hears the coordinator's messages and answers them."""

    def __init__(self, environment: Any) -> None:
        self.environment, self.runner = environment, environment.runner
        self.generator: Generator | None = None
        self.finished = gevent.event.Event()
        self._sent, self._started = 0, False
        self._remote, self._folder = LOAD is None, ""
        for name in ("load", "begin", "measure", "window", "clock"):
            self.runner.register_message(f"inferctl-{name}", getattr(self, f"_{name}"))

    def start(self) -> None:
        """All users are here: say so, once what they send is known. Locust says it again when it spreads them anew for one that came late."""
        if self._started:
            return
        self._started = True
        if LOAD is None:
            self.runner.send_message("inferctl-need", {})
        else:
            self._prepare(LOAD, load_files(LOAD), int(LOAD["workers"]) + int(LOAD.get("remote_workers", 0)))

    def _load(self, msg: Any, **_: Any) -> None:
        self._folder = tempfile.mkdtemp(prefix="inferctl-load-")
        self._prepare({**msg.data["load"], "output": self._folder}, msg.data["files"], msg.data["workers"])

    def _prepare(self, load: dict[str, Any], files: dict[str, bytes], workers: int) -> None:
        index = int(self.runner.worker_index)
        header = {"worker": index, "pid": os.getpid(), "machine": clock.machine()}
        recorder = Recorder(Path(load["output"]) / f"requests-{index}.bin", header)
        self.generator = Generator(load, files, index, workers, recorder, self._answered)
        self.runner.send_message(
            "inferctl-ready", {"worker": index, "users": self.runner.user_count, "machine": clock.machine()}
        )

    def _begin(self, msg: Any, **_: Any) -> None:
        assert self.generator  # it is told to begin after it said that it was ready
        self.generator.begin(**msg.data)

    def _measure(self, msg: Any, **_: Any) -> None:
        assert self.generator
        self.generator.measure(**msg.data)
        gevent.spawn(self._finish)
        if self._remote:
            gevent.spawn(self._send_records)

    def _window(self, **_: Any) -> None:
        assert self.generator
        self.generator.warm, latencies = [], self.generator.warm
        self.runner.send_message("inferctl-reply", {"latencies": latencies})

    def _clock(self, **_: Any) -> None:
        self.runner.send_message("inferctl-reply", {"now_ns": time.monotonic_ns()})

    def _finish(self) -> None:
        assert self.generator
        self.generator.finished.wait()
        if self._remote:
            self._send_piece()
        self.generator.recorder.close()
        self.tidy()
        self.runner.send_message("inferctl-done", self.generator.state)
        self.finished.set()

    def tidy(self) -> None:
        """Leave nothing on a machine that is not the bench's, however the run ended."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _send_records(self) -> None:
        while not self.finished.is_set():
            self._send_piece()
            gevent.sleep(SEND_EVERY_S)

    def _send_piece(self) -> None:
        assert self.generator
        content = self.generator.recorder.since(self._sent)
        self._sent += len(content)
        for at in range(0, len(content), PIECE):
            self.runner.send_message(
                "inferctl-records", {"worker": self.generator.worker, "content": content[at : at + PIECE]}
            )

    def _answered(self, latency_ms: float, size: int, error: int) -> None:
        """For Locust's own statistics, which are kept beside the records for comparison."""
        self.environment.stats.log_request("POST", "embeddings", latency_ms, size)
        if error != OK:
            self.environment.stats.log_error("POST", "embeddings", str(error))


def end_with_parent() -> None:
    """Be killed when whoever started us dies, however that happens: a load that nobody waits for must not go on (Linux only)."""
    parent = os.getppid()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


end_with_parent()
worker: Worker | None = None


@events.init.add_listener
def connect(environment: Any, **_: Any) -> None:
    global worker
    runner = environment.runner
    if isinstance(runner, WorkerRunner | LocalRunner):
        worker = Worker(environment)
    if isinstance(runner, MasterRunner | LocalRunner):
        assert LOAD is not None  # inferctl starts these, and always says what to send
        coordinator = Coordinator(environment, LOAD, lambda: load_files(LOAD))
        environment.events.test_start.add_listener(lambda **_: gevent.spawn(coordinator.run))
        if isinstance(runner, MasterRunner):
            part = Path(LOAD["output"]) / ".master.json"
            part.write_text(json.dumps({"port": runner.server.port}))
            part.rename(part.with_name("master.json"))


@events.spawning_complete.add_listener
def spawned(**_: Any) -> None:
    if worker:
        worker.start()


@events.quitting.add_listener
def leave(**_: Any) -> None:
    if worker:
        worker.tidy()


class Client(User):
    """A client of a closed loop; of an open loop, the one that plays this worker's share of the schedule."""

    @task
    def send(self) -> None:
        assert worker
        worker.finished.wait()
        raise StopUser
