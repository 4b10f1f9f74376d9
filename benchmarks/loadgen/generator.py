"""What one process sends and when, and what it records: its share of a drawn schedule, or of the clients of a closed loop."""

from __future__ import annotations

import array
import contextlib
import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gevent
import gevent.event

from loadgen.alarm import Alarm
from loadgen.client import Answer, Client, Flight
from loadgen.recorder import CONNECTION, DROPPED, MEASURED, OK, WARMUP, Recorder

NAN = float("nan")
SERVER_TIMES = ("x-inferctl-queue-ms", "x-inferctl-tokenize-ms", "x-inferctl-inference-ms")
LATE_NS = 1_000_000
BURST = 16
# An idle core takes some 60 µs to wake up. It is woken early and the rest is waited for awake, unless it is too busy to be idle.
EARLY_NS, SPARSE_NS = 120_000, 1_000_000
PAUSE_S = 0.05


def integers(content: bytes, code: str) -> array.array[int]:
    """Little-endian integers (`I` uint32, `Q` uint64)."""
    values: array.array[int] = array.array(code)
    values.frombytes(content)
    if sys.byteorder == "big":
        values.byteswap()
    return values


class Bodies:
    """Request bodies, with the numbers that make inputs unique put into them."""

    def __init__(self, content: bytes, order: bytes, serial: int) -> None:
        self._parts = [body.split(b"@SERIAL@") for body in content.splitlines()]
        self._order = integers(order, "I")
        self._serial = serial

    def at(self, phase: int, index: int) -> bytes:
        """The body of the n-th request of a phase."""
        parts = self._parts[self._order[index % len(self._order)]]
        if len(parts) == 1:
            return parts[0]
        return (b"%d %d" % (self._serial + (phase == WARMUP), index)).join(parts)


class Generator:
    """Sends and records. `load` is the description in load.json, `files` the content of the files that it names.

    Requests are numbered over all workers: this one has those whose number leaves the rest `worker` when divided by `workers`.
    `finished` is set when everything that left before the end has its answer or was given up.
    """

    def __init__(
        self,
        load: Mapping[str, Any],
        files: Mapping[str, bytes],
        worker: int,
        workers: int,
        recorder: Recorder,
        answered: Callable[[float, int, int], None],
    ) -> None:
        self.load, self.worker, self.workers, self.recorder = load, worker, workers, recorder
        self.bodies = Bodies(files["bodies"], files["order"], int(load["serial"]))
        self.schedules = [integers(files[name], "Q")[worker::workers] for name in ("warmup_schedule", "schedule")]
        self.client = Client(load["url"], load["timeout_s"], self._landed, load.get("headers") or {})
        self.open = load["mode"] == "open"
        self.max_outstanding = max(1, load["max_outstanding"] // workers)
        self.finished = gevent.event.Event()
        self.warm: list[float] = []
        self.late = self.dropped = 0
        self.first_user, self.users = 0, 0
        self._answered = answered
        self._alarm = Alarm(self._due)
        self._phase, self._begun_ns, self._next, self._last_due = WARMUP, 0, 0, 0
        self._switch_ns = self._stop_ns = 0
        self._taken = 0
        self._parked: list[int] = []
        self._cpu: dict[str, Any] = {}

    @property
    def state(self) -> dict[str, Any]:
        """This process's account of itself."""
        return {
            "worker": self.worker,
            "pid": os.getpid(),
            "users": self.users,
            "records": self.recorder.count,
            "late": self.late,
            "dropped": self.dropped,
            "unfinished": self.client.outstanding,
            "connections": self.client.opened,
            "reconnects": self.client.reconnects,
            "exact_timer": self._alarm.exact,
            **self._cpu,
        }

    def begin(self, start_ns: int, first_user: int, users: int) -> None:
        """Start the warm-up at `start_ns`; the clients of a closed loop here are numbered from `first_user`."""
        self.first_user, self.users = first_user, users
        self._begun_ns = start_ns
        self._parked = [] if self.open else list(range(users))
        self._alarm.set(start_ns)

    def measure(self, start_ns: int) -> None:
        """Go over to the measurement at `start_ns`, without a pause, and to the end `duration_s` later."""
        self._switch_ns = start_ns
        self._stop_ns = start_ns + int(self.load["duration_s"] * 1e9)
        self._alarm.set(time.monotonic_ns() if self.open else start_ns)
        gevent.spawn(self._account)

    def _due(self) -> None:
        self._play() if self.open else self._fill()

    def _play(self) -> None:
        """Open loop: send everything that is due, and wait for the next one."""
        now = time.monotonic_ns()
        for sent in range(BURST):
            if self._phase == WARMUP and self._switch_ns and now >= self._switch_ns:
                self._phase, self._begun_ns, self._next = MEASURED, self._switch_ns, 0
            schedule = self.schedules[self._phase]
            if self._next == len(schedule):
                if self._phase == WARMUP and self._switch_ns:
                    self._alarm.set(self._switch_ns)
                return
            due = self._begun_ns + schedule[self._next]
            early = EARLY_NS if due - self._last_due > SPARSE_NS else 0
            if due - now > (0 if sent else early):
                # The measurement's first request must not wait for the warm-up's next one.
                waits = self._phase == WARMUP and self._switch_ns
                self._alarm.set((min(due, self._switch_ns) if waits else due) - early)
                return
            while now < due:
                now = time.monotonic_ns()
            index = self._next * self.workers + self.worker
            self._next += 1
            self._last_due = due
            self._leave(index, due)
            now = time.monotonic_ns()
        # Behind by more than a burst: answers that wait are read first, or their times would be ours.
        self._alarm.set(now)

    def _leave(self, index: int, due: int) -> None:
        phase = self._phase
        if self.client.outstanding >= self.max_outstanding:
            self.dropped += phase == MEASURED
            self.recorder.add(due, 0, 0, due, index, 0, 0, NAN, NAN, NAN, 0, phase, DROPPED)
            return
        flight = Flight(phase, index, self.client.request(self.bodies.at(phase, index)), due)
        self.client.send(flight)
        self.late += phase == MEASURED and flight.sent_ns - due > LATE_NS

    def _fill(self) -> None:
        """Closed loop: start every client that has nothing to wait for, and come back when the number of clients changes."""
        now = time.monotonic_ns()
        waiting, self._parked = self._parked, []
        for user in waiting:
            self._again(user, now)
        begun = self._switch_ns or self._begun_ns
        changes = [begun + int(at * 1e9) for at in self._changes()] if self._switch_ns else []
        if later := [at for at in [self._switch_ns, *changes] if at > now]:
            self._alarm.set(min(later))

    def _changes(self) -> list[float]:
        """Seconds after the start of the measurement at which the number of clients changes."""
        ends, at = [], 0.0
        for stage in self.load.get("timeline") or []:
            at += stage["duration_s"]
            ends.append(at)
        return ends[:-1]

    def _wanted(self, now: int) -> int:
        """Clients (over all workers) that are to be busy now."""
        stages = self.load.get("timeline") or []
        passed = (now - self._switch_ns) / 1e9 if self._switch_ns and now >= self._switch_ns else 0.0
        for stage in stages:
            if passed < stage["duration_s"]:
                return int(stage["users"])
            passed -= stage["duration_s"]
        return int(stages[-1]["users"] if stages else self.load["users"])

    def _again(self, user: int, now: int) -> None:
        """A client's next request, unless the time is over or the stage has no place for it."""
        if self._stop_ns and now >= self._stop_ns:
            return
        if self.first_user + user >= self._wanted(now):
            self._parked.append(user)
            return
        if self._phase == WARMUP and self._switch_ns and now >= self._switch_ns:
            self._phase, self._taken = MEASURED, 0
        index = self._taken * self.workers + self.worker
        self._taken += 1
        self.client.send(Flight(self._phase, index, self.client.request(self.bodies.at(self._phase, index)), 0, user))

    def _landed(self, flight: Flight, answer: Answer | None) -> None:
        end, intended = flight.end_ns, flight.intended_ns
        if answer:
            headers = answer.headers
            times = [number(headers.get(name)) for name in SERVER_TIMES]
            size, tokens, status = answer.size, answer.tokens, answer.status
        else:
            times, size, tokens, status = [NAN, NAN, NAN], 0, 0, 0
        self.recorder.add(
            intended,
            flight.sent_ns,
            flight.first_ns or end,
            end,
            flight.index,
            size,
            tokens,
            *times,
            status,
            flight.phase,
            flight.error,
        )
        self._answered((end - flight.sent_ns) / 1e6, size, flight.error)
        if flight.phase == WARMUP and flight.error == OK:
            self.warm.append((end - intended) / 1e6)
        if flight.user is None:
            return
        if flight.error == CONNECTION:
            # A server that is gone would be asked as often as the machine can.
            gevent.spawn_later(PAUSE_S, lambda: self._again(flight.user, time.monotonic_ns()))
        else:
            self._again(flight.user, end)

    def _account(self) -> None:
        """Note the CPU time of this process while it measures, and its busiest second; then wait for the last answers."""
        # A full collection takes milliseconds, which would be in somebody's latency. What is left uncollected is bounded by the run.
        gc.collect()
        gc.disable()
        gevent.sleep(max(0.0, (self._switch_ns - time.monotonic_ns()) / 1e9))
        first = last = (time.monotonic_ns(), time.process_time_ns())
        peak = 0.0
        while (left := (self._stop_ns - time.monotonic_ns()) / 1e9) > 0:
            # The last stretch is not split: a share of a tenth of a second says nothing.
            gevent.sleep(left if left < 1.5 else 1.0)
            now = (time.monotonic_ns(), time.process_time_ns())
            peak = max(peak, (now[1] - last[1]) / (now[0] - last[0]))
            last = now
        self._cpu = {
            "cpu_ns": last[1] - first[1],
            "cpu_wall_ns": last[0] - first[0],
            "cpu_peak_percent": round(100 * peak, 1),
            "involuntary_switches": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
        }
        deadline = time.monotonic() + self.load["timeout_s"] + 5
        while time.monotonic() < deadline and (self.client.outstanding or self._unsent()):
            gevent.sleep(0.02)
        self._alarm.off()
        gc.enable()
        self.finished.set()

    def _unsent(self) -> bool:
        return self.open and (self._phase == WARMUP or self._next < len(self.schedules[MEASURED]))


def number(text: str | None) -> float:
    """A header's number, NaN when there is none."""
    if text:
        with contextlib.suppress(ValueError):
            return float(text)
    return NAN


def load_files(load: Mapping[str, Any]) -> dict[str, bytes]:
    """Content of the files that a description names."""
    return {name: Path(load[name]).read_bytes() for name in ("bodies", "order", "schedule", "warmup_schedule")}
