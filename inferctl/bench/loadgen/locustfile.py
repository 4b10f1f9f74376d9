"""Locust runs this file to send a load. Each process records every request exactly. No module imports it.

    INFERCTL_LOAD_FILE=load.json python -m locust -f inferctl/bench/loadgen/locustfile.py --headless ...
    python -m inferctl.bench.load.worker HOST        (a worker on another machine)

inferctl/bench/load/load_run.py uses the first form. `load.json` describes the load:

    url           the URL for POST requests
    mode          closed: `users` clients; each one sends its next request after its last response. After a 429, it
                  waits for the seconds in `Retry-After` first.
                  open: requests are sent at the times of `schedule`, and latency counts from these times.
    bodies        file with one JSON request body per line; `@SERIAL@` becomes a number that is unique per request
    order         file of uint32 (little-endian): the body of each request; it repeats from the start after its end
    schedule      open: file of uint64, nanoseconds after the start of the measurement; also `warmup_schedule`
    timeline      closed: stages of {duration_s, users}; empty for a constant number of `users`
    users, duration_s, warmup_s (maximum), window_s, timeout_s, max_outstanding (open), serial, workers, remote_workers
    events        whether the responses are event streams of a generation server
    output        folder for the output files

The variable INFERCTL_LOAD_HEADERS has further headers of each request, as a JSON object. They may be secrets.

The output files are `requests-<worker>.bin` and `state-0.json`. A requests file has a line of magic, a line of JSON
that names the fields, then one fixed-size record per request (see recorder.py). For generation,
`events-<worker>.bin` has one record per event with tokens. The state has the phase of the run and its times, whether
the warm-up was steady, and the figures of each worker.

Locust starts, connects and stops the processes and distributes the users. The requests are sent by:

    generator     what is sent, and when
    client        HTTP
    stream        event streams of generation servers
    recorder      records
    coordinator   phases of a run over all workers
    clock         workers on other machines

All times are nanoseconds of CLOCK_MONOTONIC in the process that wrote them.
"""

from __future__ import annotations

import atexit
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
from locust import User, events, task
from locust.exception import StopUser
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from inferctl.bench.loadgen import clock
from inferctl.bench.loadgen.coordinator import Coordinator
from inferctl.bench.loadgen.generator import Generator, load_files
from inferctl.bench.loadgen.recorder import (
    EVENT_FIELDS,
    EVENTS_MAGIC,
    FIELDS,
    OK,
    STREAM_FIELDS,
    Recorder,
    exit_on_write_error,
)
from inferctl.core import outputs

FILE = os.environ.get("INFERCTL_LOAD_FILE")
LOAD: dict[str, Any] | None = json.loads(Path(FILE).read_text()) if FILE else None
if LOAD:
    LOAD["headers"] = json.loads(os.environ.get("INFERCTL_LOAD_HEADERS", "{}"))
SEND_INTERVAL_S, CHUNK_BYTES = 1.0, 1 << 20


class Worker:
    """Connect a generator to Locust: handle the messages of the coordinator and reply to them."""

    def __init__(self, environment: Any) -> None:
        self.environment, self.runner = environment, environment.runner
        self.generator: Generator | None = None
        self.finished = gevent.event.Event()
        self._sent_bytes, self._started = [0, 0], False
        self._remote, self._folder = LOAD is None, ""
        for name in ("load", "begin", "measure", "window", "clock"):
            self.runner.register_message(f"inferctl-{name}", getattr(self, f"_{name}"))

    def start(self) -> None:
        """Prepare the load and report that all users of this worker are started.

        Locust calls this again when it redistributes the users for a worker that connected late.
        """
        if self._started:
            return
        self._started = True
        if LOAD is None:
            self.runner.send_message("inferctl-need", {})
        else:
            self._prepare(LOAD, load_files(LOAD), int(LOAD["workers"]) + int(LOAD.get("remote_workers", 0)))

    def _load(self, msg: Any, **_: Any) -> None:
        with exit_on_write_error():
            self._folder = tempfile.mkdtemp(prefix="inferctl-load-")
        atexit.register(self.remove_files)
        self._prepare({**msg.data["load"], "output": self._folder}, msg.data["files"], msg.data["workers"])

    def _prepare(self, load: dict[str, Any], files: dict[str, bytes], workers: int) -> None:
        index = int(self.runner.worker_index)
        header = {"worker": index, "pid": os.getpid(), "machine": clock.machine()}
        folder, events = Path(load["output"]), None
        if load.get("events"):
            events = Recorder(folder / f"events-{index}.bin", header, EVENT_FIELDS, EVENTS_MAGIC)
        recorder = Recorder(folder / f"requests-{index}.bin", header, FIELDS + STREAM_FIELDS if events else FIELDS)
        self.generator = Generator(load, files, index, workers, recorder, events, self._on_complete)
        self.runner.send_message(
            "inferctl-ready", {"worker": index, "users": self.runner.user_count, "machine": clock.machine()}
        )

    def _begin(self, msg: Any, **_: Any) -> None:
        assert self.generator  # the coordinator sends this after the worker reported that it was ready
        self.generator.begin(**msg.data)

    def _measure(self, msg: Any, **_: Any) -> None:
        assert self.generator
        self.generator.measure(**msg.data)
        gevent.spawn(self._finish)
        if self._remote:
            gevent.spawn(self._send_records)

    def _window(self, **_: Any) -> None:
        assert self.generator
        self.generator.warmup_ms, latencies = [], self.generator.warmup_ms
        events = self.generator.events.count if self.generator.events else 0
        self.runner.send_message("inferctl-reply", {"latencies": latencies, "events": events})

    def _clock(self, **_: Any) -> None:
        self.runner.send_message("inferctl-reply", {"now_ns": time.monotonic_ns()})

    def _finish(self) -> None:
        assert self.generator
        self.generator.finished.wait()
        if self._remote:
            self._send_chunk()
        for recorder in self._recorders():
            recorder.close()
        self.remove_files()
        self.runner.send_message("inferctl-done", self.generator.state)
        self.finished.set()

    def remove_files(self) -> None:
        """Remove the temporary folder that a worker on another machine uses, also after an interrupted run."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _send_records(self) -> None:
        while not self.finished.is_set():
            self._send_chunk()
            gevent.sleep(SEND_INTERVAL_S)

    def _recorders(self) -> list[Recorder]:
        assert self.generator
        return [recorder for recorder in (self.generator.recorder, self.generator.events) if recorder]

    def _send_chunk(self) -> None:
        for number, recorder in enumerate(self._recorders()):
            content = recorder.since(self._sent_bytes[number])
            self._sent_bytes[number] += len(content)
            for at in range(0, len(content), CHUNK_BYTES):
                self.runner.send_message(
                    "inferctl-records", {"file": recorder.path.name, "content": content[at : at + CHUNK_BYTES]}
                )

    def _on_complete(self, latency_ms: float, size: int, error: int) -> None:
        """Update Locust's own statistics, which are saved for comparison with the records."""
        self.environment.stats.log_request("POST", "embeddings", latency_ms, size)
        if error != OK:
            self.environment.stats.log_error("POST", "embeddings", str(error))


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends (Linux only), so that no load runs without its
    benchmark."""
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
        assert LOAD is not None  # inferctl starts these processes with a load file
        coordinator = Coordinator(environment, LOAD, lambda: load_files(LOAD))
        environment.events.test_start.add_listener(lambda **_: gevent.spawn(coordinator.run))
        if isinstance(runner, MasterRunner):
            port = json.dumps({"port": runner.server.port})
            with exit_on_write_error():
                outputs.replace(Path(LOAD["output"]) / "master.json", port, sync=False)


@events.spawning_complete.add_listener
def spawned(**_: Any) -> None:
    if worker:
        worker.start()


class IdleUser(User):
    """A user of Locust. It sends nothing itself: the generator sends the requests, and the user waits for their end."""

    @task
    def send(self) -> None:
        assert worker
        worker.finished.wait()
        raise StopUser
