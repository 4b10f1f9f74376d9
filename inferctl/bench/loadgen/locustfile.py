"""Locust runs this file to send a load. Each process records every request exactly. No module imports it.

    INFERCTL_LOAD_FILE=load.json python -m locust -f inferctl/bench/loadgen/locustfile.py --headless ...

`load.json` describes the load:

    names         the models and adapters that requests name: {name, url, first}. Requests of a name go to its `url`,
                  and its bodies begin at the number `first`
    mode          closed: `users` clients; each one sends its next request after its last response. After a 429, it
                  waits for the seconds in `Retry-After` first.
                  open: requests are sent at the times of `schedule`, and latency counts from these times.
    bodies        file with one JSON request body per line; `@SERIAL@` becomes a number that is unique per request
    order         file of uint32: the body of each request; it repeats from the start after its end
    schedule      open: file of uint64, nanoseconds after the start of the measurement; also `warmup_schedule`
    timeline      closed: stages of {duration_s, users}; empty for a constant number of `users`
    users, duration_s, warmup_s (maximum), window_s, timeout_s, max_outstanding (open), serial, workers
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

All times are nanoseconds of CLOCK_MONOTONIC in the process that wrote them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
from pathlib import Path
from typing import Any

import gevent
import gevent.event
from locust import User, events, task
from locust.exception import StopUser
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from inferctl.bench.loadgen.coordinator import Coordinator
from inferctl.bench.loadgen.generator import Generator
from inferctl.bench.loadgen.recorder import (
    EVENT_FIELDS,
    EVENTS_MAGIC,
    FIELDS,
    STREAM_FIELDS,
    Recorder,
    exit_on_write_error,
)
from inferctl.core import outputs

LOAD: dict[str, Any] = json.loads(Path(os.environ["INFERCTL_LOAD_FILE"]).read_text())
LOAD["headers"] = json.loads(os.environ.get("INFERCTL_LOAD_HEADERS", "{}"))


class Worker:
    """Connect a generator to Locust: handle the messages of the coordinator and reply to them."""

    def __init__(self, environment: Any) -> None:
        self.runner = environment.runner
        self.generator: Generator | None = None
        self.finished = gevent.event.Event()
        for name in ("begin", "measure", "window"):
            self.runner.register_message(f"inferctl-{name}", getattr(self, f"_{name}"))

    def start(self) -> None:
        """Prepare the load and report that all users of this worker are started.

        Locust calls this again when it redistributes the users for a worker that connected late.
        """
        if self.generator:
            return
        index = int(self.runner.worker_index)
        header = {"worker": index, "pid": os.getpid()}
        folder, events = Path(LOAD["output"]), None
        if LOAD.get("events"):
            events = Recorder(folder / f"events-{index}.bin", header, EVENT_FIELDS, EVENTS_MAGIC)
        recorder = Recorder(folder / f"requests-{index}.bin", header, FIELDS + STREAM_FIELDS if events else FIELDS)
        self.generator = Generator(LOAD, index, recorder, events)
        self.runner.send_message("inferctl-ready", {"worker": index, "users": self.runner.user_count})

    def _begin(self, msg: Any, **_: Any) -> None:
        assert self.generator  # the coordinator sends this after the worker reported that it was ready
        self.generator.begin(**msg.data)

    def _measure(self, msg: Any, **_: Any) -> None:
        assert self.generator
        self.generator.measure(**msg.data)
        gevent.spawn(self._finish)

    def _window(self, **_: Any) -> None:
        assert self.generator
        self.generator.warmup_ms, latencies = [], self.generator.warmup_ms
        events = self.generator.events.count if self.generator.events else 0
        self.runner.send_message("inferctl-reply", {"latencies": latencies, "events": events})

    def _finish(self) -> None:
        assert self.generator
        self.generator.finished.wait()
        for recorder in filter(None, (self.generator.recorder, self.generator.events)):
            recorder.close()
        self.runner.send_message("inferctl-done", self.generator.state)
        self.finished.set()


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
        coordinator = Coordinator(environment, LOAD)
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
