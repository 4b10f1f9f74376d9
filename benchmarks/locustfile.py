"""The load: Locust users that record every request exactly. Run it as a process of its own, never import it.

    INFERCTL_LOAD_FILE=load.json python -m locust -f benchmarks/locustfile.py --headless ...

`load.json` says what to send; `inferctl/bench/load.py` writes it:

    url           where to POST
    mode          closed: `users` clients, each sends its next request when the last one is answered.
                  open: requests leave at the times of `schedule`, whatever the server does, and latency counts from those times.
    bodies        file with one JSON request body a line; `@SERIAL@` in it becomes a number that no other request has
    order         file of uint32 (little endian): which body the n-th request takes, repeated when it ends
    schedule      open: file of uint64, nanoseconds after the start of the measurement; `warmup_schedule` likewise
    users, duration_s, warmup_s (at most), window_s, timeout_s, max_outstanding (open), serial
    output        folder for what is written here

Written: `requests-<worker>.bin` (a line of magic, a line of JSON that names the fields, then one fixed-size record a request: numpy reads
it in one call, a client killed in mid-write loses nothing but the last record, and packing one costs the client about a microsecond)
and `state-<worker>.json` (phase and its times, whether the warm-up settled, CPU time of this process).

All times are CLOCK_MONOTONIC in nanoseconds, which every process of a machine shares.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import re
import struct
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.pool
from locust import FastHttpUser, events, task
from locust.exception import StopUser

MAGIC = b"inferctl-requests-1\n"
# name, numpy type, struct code; the order is the order in the file.
FIELDS = (
    ("intended_ns", "<u8", "Q"),  # when it should have left; for a closed loop the same as sent_ns
    ("sent_ns", "<u8", "Q"),  # when it left; 0 when it was dropped
    ("first_ns", "<u8", "Q"),  # status line and headers are here
    ("end_ns", "<u8", "Q"),  # the whole answer is here, or the failure
    ("index", "<u4", "I"),  # n-th request of its phase
    ("bytes", "<u4", "I"),  # size of the answer's body
    ("tokens", "<u4", "I"),  # tokens the server counted; 0 when it does not say
    ("queue_ms", "<f4", "f"),  # the server's own figures; NaN when it does not say
    ("tokenize_ms", "<f4", "f"),
    ("inference_ms", "<f4", "f"),
    ("status", "<u2", "H"),  # HTTP status; 0 without an answer
    ("phase", "<u1", "B"),  # 0 warm-up, 1 measured
    ("error", "<u1", "B"),  # 0 none, 1 HTTP status, 2 timeout, 3 connection, 4 dropped: too many outstanding
)
PACKER = struct.Struct("<" + "".join(code for _, _, code in FIELDS))
WARMUP, MEASURED = 0, 1
OK, HTTP_ERROR, TIMEOUT, CONNECTION, DROPPED = range(5)
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
USAGE = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
NAN = float("nan")
STEADY_WINDOWS, STEADY_SPREAD = 3, 0.10

LOAD: dict[str, Any] = json.loads(Path(os.environ["INFERCTL_LOAD_FILE"]).read_text())


def integers(file: str, code: str) -> array.array[int]:
    """Little-endian integers of a file (`I` uint32, `Q` uint64)."""
    values: array.array[int] = array.array(code)
    values.frombytes(Path(file).read_bytes())
    if sys.byteorder == "big":
        values.byteswap()
    return values


class Recorder:
    """Appends records to this worker's file."""

    def __init__(self, folder: Path, worker: int) -> None:
        header = {
            "fields": [[name, kind] for name, kind, _ in FIELDS],
            "clock": "CLOCK_MONOTONIC",
            "worker": worker,
            "pid": os.getpid(),
        }
        self._file = (folder / f"requests-{worker}.bin").open("wb")
        self._file.write(MAGIC + json.dumps(header).encode() + b"\n")
        self.flush()

    def add(self, *values: float) -> None:
        self._file.write(PACKER.pack(*values))

    def flush(self) -> None:
        self._file.flush()


class Load:
    """What is sent and when; one per worker process."""

    def __init__(self, worker: int, workers: int) -> None:
        self.worker, self.workers = worker, workers
        self.folder = Path(LOAD["output"])
        self.bodies = Path(LOAD["bodies"]).read_bytes().splitlines()
        self.order = integers(LOAD["order"], "I")
        self.recorder = Recorder(self.folder, worker)
        self.phase = WARMUP
        self.measuring = gevent.event.Event()
        self.taken = 0
        self.outstanding = 0
        self.active = 0
        self.stop_ns: int | None = None
        self.window: list[int] = []
        self.enough = max(10, 2 * int(LOAD["users"])) if LOAD["mode"] == "closed" else 10
        self.state: dict[str, Any] = {
            "phase": "warm-up",
            "mode": LOAD["mode"],
            "worker": worker,
            "windows": [],
            "steady": False,
        }

    def announce(self, **changes: Any) -> None:
        """Publish where the run is, atomically."""
        self.state.update(changes)
        part = self.folder / f".state-{self.worker}.json"
        part.write_text(json.dumps(self.state))
        part.rename(self.folder / f"state-{self.worker}.json")

    def take(self) -> tuple[int, int] | None:
        """Phase and number of the next request of a closed loop; None when the time is over."""
        if self.stop_ns is not None and time.monotonic_ns() >= self.stop_ns:
            return None
        index = self.taken * self.workers + self.worker
        self.taken += 1
        return self.phase, index

    def send(self, client: Any, phase: int, index: int, intended_ns: int | None = None) -> None:
        """Send one request and record it."""
        body = self.bodies[self.order[index % len(self.order)]]
        if b"@SERIAL@" in body:
            body = body.replace(b"@SERIAL@", b"%d %d" % (LOAD["serial"] + (phase == WARMUP), index))
        self.outstanding += 1
        sent = time.monotonic_ns()
        with client.post(
            LOAD["url"], data=body, headers=HEADERS, name="embeddings", catch_response=True, stream=True
        ) as response:
            first = time.monotonic_ns()
            size, tail, failure = 0, b"", getattr(response, "error", None)
            try:
                content = response.content or b""
                size, tail = len(content), content[-200:]
            except Exception as error:  # noqa: BLE001 - any failure to read the answer is a failed request, not a failed client
                failure = error
            end = time.monotonic_ns()
            headers = response.headers or {}
            status = response.status_code or 0
            response.request_meta["response_time"] = (end - sent) / 1e6
            kind = kind_of(failure, status)
            if kind != OK:
                response.failure(f"{status} {failure}")
        self.outstanding -= 1
        tokens = headers.get("x-inferctl-tokens") or (found[1] if (found := USAGE.search(tail)) else 0)
        timings = [number(headers.get(f"x-inferctl-{name}-ms")) for name in ("queue", "tokenize", "inference")]
        self.recorder.add(
            intended_ns or sent, sent, first, end, index, size, int(tokens), *timings, status, phase, kind
        )
        if kind == OK and phase == WARMUP:
            self.window.append(end - (intended_ns or sent))

    def warm_up(self) -> None:
        """Return when three windows in a row agree within 10 %, or when the time for it is up."""
        started = time.monotonic_ns()
        self.announce(warmup_start_ns=started)
        figures: list[float] = []
        while time.monotonic_ns() - started < LOAD["warmup_s"] * 1e9:
            self.window = []
            begun = time.monotonic_ns()
            self.wait(LOAD["window_s"])
            # Too few answers agree by chance: a slow server gets longer windows.
            while len(self.window) < self.enough and time.monotonic_ns() - started < LOAD["warmup_s"] * 1e9:
                self.wait(0.2)
            done = sorted(self.window)
            # An open loop completes what is offered whatever the server does, so there the latency must settle instead.
            figure = (
                len(done) / (time.monotonic_ns() - begun) * 1e9
                if LOAD["mode"] == "closed"
                else (done[len(done) // 2] / 1e6 if done else 0.0)
            )
            figures.append(figure)
            last = figures[-STEADY_WINDOWS:]
            steady = (
                len(last) == STEADY_WINDOWS
                and min(last) > 0
                and max(last) - min(last) <= STEADY_SPREAD * sum(last) / len(last)
            )
            self.announce(windows=figures, steady=steady)
            if steady:
                return

    def wait(self, seconds: float) -> None:
        """Sleep, handing finished records to the operating system on the way so that the run can be watched."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            gevent.sleep(min(left, 0.2))
            self.recorder.flush()

    def control(self, environment: Any) -> None:
        """Warm up, measure, drain, quit."""
        while self.active == 0:
            gevent.sleep(0.01)
        self.warm_up()
        environment.stats.reset_all()
        cpu, begun = time.process_time_ns(), time.monotonic_ns()
        self.taken, self.phase, self.stop_ns = 0, MEASURED, begun + int(LOAD["duration_s"] * 1e9)
        self.measuring.set()
        self.announce(phase="measure", measure_start_ns=begun, measure_end_ns=self.stop_ns)
        self.wait(LOAD["duration_s"])
        self.announce(phase="drain", cpu_ns=time.process_time_ns() - cpu, cpu_wall_ns=time.monotonic_ns() - begun)
        deadline = time.monotonic() + LOAD["timeout_s"] + 5
        while (self.active or self.outstanding) and time.monotonic() < deadline:
            self.wait(0.05)
        self.recorder.flush()
        total = environment.stats.total
        rounded = {f"p{q * 100:g}": total.get_response_time_percentile(q) for q in (0.5, 0.9, 0.95, 0.99)}
        self.announce(
            phase="done", done_ns=time.monotonic_ns(), unfinished=self.outstanding, locust_percentiles_ms=rounded
        )
        environment.runner.quit()


def kind_of(failure: object, status: int) -> int:
    """Which of the error codes describes the outcome."""
    if status >= 400:
        return HTTP_ERROR
    if failure is None and status:
        return OK
    return TIMEOUT if "timed out" in str(failure).lower() or isinstance(failure, TimeoutError) else CONNECTION


def number(text: str | None) -> float:
    """A header's number, NaN when there is none."""
    with contextlib.suppress(TypeError, ValueError):
        return float(text)  # type: ignore[arg-type]  # None is one of the cases
    return NAN


load: Load


@events.test_start.add_listener
def begin(environment: Any, **_: Any) -> None:
    global load
    load = Load(int(getattr(environment.runner, "worker_index", 0) or 0), int(LOAD.get("workers", 1)))
    gevent.spawn(load.control, environment)


class _Client(FastHttpUser):
    abstract = True
    host = LOAD["url"]
    network_timeout = connection_timeout = LOAD["timeout_s"]
    concurrency = LOAD.get("max_outstanding", 1)

    def on_start(self) -> None:
        load.active += 1

    def on_stop(self) -> None:
        load.active -= 1


if LOAD["mode"] == "closed":

    class ClosedLoop(_Client):
        """One user: the next request leaves when the last one is answered."""

        @task
        def embed(self) -> None:
            ticket = load.take()
            if ticket is None:
                raise StopUser
            load.send(self.client, *ticket)

else:

    class OpenLoop(_Client):
        """One dispatcher: each request leaves at its own time and waits for its answer in a greenlet of its own."""

        fixed_count = 1

        @task
        def dispatch(self) -> None:
            pool = gevent.pool.Pool()
            begun = time.monotonic_ns()
            self.play(pool, WARMUP, LOAD["warmup_schedule"], begun)
            load.measuring.wait()
            assert load.stop_ns is not None  # set together with the phase
            self.play(pool, MEASURED, LOAD["schedule"], load.stop_ns - int(LOAD["duration_s"] * 1e9))
            pool.join()
            raise StopUser

        def play(self, pool: gevent.pool.Pool, phase: int, file: str, begun_ns: int) -> None:
            """Spawn each request of the schedule at its time; one that finds too many outstanding is recorded as dropped."""
            for index, offset in enumerate(integers(file, "Q")):
                if index % load.workers != load.worker:
                    continue
                due = begun_ns + offset
                while (left := due - time.monotonic_ns()) > 0 and load.phase == phase:
                    # The measurement's first requests must not wait for the warm-up's next one.
                    if phase == WARMUP:
                        load.measuring.wait(left / 1e9)
                    else:
                        gevent.sleep(left / 1e9)
                if load.phase != phase:
                    return
                if load.outstanding >= LOAD["max_outstanding"]:
                    load.recorder.add(due, 0, 0, due, index, 0, 0, NAN, NAN, NAN, 0, phase, DROPPED)
                else:
                    pool.spawn(load.send, self.client, phase, index, due)
                    # Let it leave now: the send happens when this greenlet yields.
                    gevent.sleep(0)
