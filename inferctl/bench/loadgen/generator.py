"""Send the requests of one process and record them: its share of the schedule, or of the users of a closed loop."""

from __future__ import annotations

import array
import bisect
import contextlib
import gc
import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gevent
import gevent.event

from inferctl.bench.loadgen.alarm import Alarm
from inferctl.bench.loadgen.client import Client, PendingRequest, Response
from inferctl.bench.loadgen.recorder import CONNECTION, DRAIN, DROPPED, MEASURED, OK, WARMUP, Recorder
from inferctl.bench.loadgen.stream import TokenStream

NAN = float("nan")
SERVER_TIMES = ("x-inferctl-queue-ms", "x-inferctl-tokenize-ms", "x-inferctl-inference-ms")
LATE_NS = 1_000_000
BURST = 16
# An idle core takes about 60 µs to wake up. The alarm is early by EARLY_NS and the rest is a busy wait. This does not
# apply to requests that are closer than SPARSE_NS, because the core does not become idle between them.
EARLY_NS, SPARSE_NS = 120_000, 1_000_000
PAUSE_S = 0.05
# What a phase adds to the serial, so that no prompt occurs in two phases.
SERIALS = {MEASURED: 0, WARMUP: 1, DRAIN: 2}
TOO_MANY_REQUESTS = 429


def integers(content: bytes, code: str) -> array.array[int]:
    """Return integers in the byte order of this machine (`I` uint32, `Q` uint64)."""
    values: array.array[int] = array.array(code)
    values.frombytes(content)
    return values


class Bodies:
    """Request bodies. Each `@SERIAL@` mark is replaced by a cache-busting prefix of two numbers.

    The second one has at least `digits` digits: in most tokenizers, such numbers have equally many tokens. `firsts` has
    the number of the first body of each name.
    """

    def __init__(self, content: bytes, order: bytes, firsts: list[int], serial: int, digits: int) -> None:
        self._parts = [body.split(b"@SERIAL@") for body in content.splitlines()]
        self._order = integers(order, "I")
        self._firsts, self._serial, self._digits = firsts, serial, digits

    def name(self, index: int) -> int:
        """Return the number of the name that request number `index` of a phase uses."""
        return bisect.bisect_right(self._firsts, self._order[index % len(self._order)]) - 1

    def at(self, phase: int, index: int) -> bytes:
        """Return the body of request number `index` of a phase."""
        parts = self._parts[self._order[index % len(self._order)]]
        if len(parts) == 1:
            return parts[0]
        return (b"%d %0*d" % (self._serial + SERIALS[phase], self._digits, index)).join(parts)


class Generator:
    """Send and record requests. `load` is the description in load.json.

    Requests are numbered over all workers. This worker sends those with number % workers == worker. `finished` is set
    when each sent request has a response or has failed. `events` records the events of a generation server's streams;
    None for other servers.

    A stream can last as long as the measurement, and its gaps depend on how many others there are. So the load goes on
    until the measured requests have ended (phase DRAIN): an open loop at the rate of the warm-up. These requests have
    no records, and those that are still in flight at the end are given up.
    """

    def __init__(self, load: Mapping[str, Any], worker: int, recorder: Recorder, events: Recorder | None) -> None:
        self.events = events
        workers = int(load["workers"])
        self.load, self.worker, self.workers, self.recorder = load, worker, workers, recorder
        bodies, order, *schedules = (
            Path(load[name]).read_bytes() for name in ("bodies", "order", "warmup_schedule", "schedule")
        )
        firsts = [name["first"] for name in load["names"]]
        self.bodies = Bodies(bodies, order, firsts, int(load["serial"]), 6 if events else 1)
        self.schedules = [integers(schedule, "Q")[worker::workers] for schedule in schedules]
        self.client = Client(
            [name["url"] for name in load["names"]], load["timeout_s"], self._record, load.get("headers") or {}
        )
        self.open = load["mode"] == "open"
        self.max_outstanding = max(1, load["max_outstanding"] // workers)
        self.finished = gevent.event.Event()
        self.warmup_ms: list[float] = []
        self.late = self.dropped = self._draining = 0
        self.first_user, self.users = 0, 0
        self._alarm = Alarm(self._on_alarm)
        self._phase, self._start_ns, self._next_scheduled, self._last_due = WARMUP, 0, 0, 0
        self._measure_ns = self._stop_ns = 0
        self._next_request = 0
        self._idle_users: list[int] = []
        self._cpu: dict[str, Any] = {}

    @property
    def state(self) -> dict[str, Any]:
        """The figures of this process for state-0.json."""
        return {
            "worker": self.worker,
            "pid": os.getpid(),
            "users": self.users,
            "records": self.recorder.count,
            "late": self.late,
            "dropped": self.dropped,
            "unfinished": self.client.outstanding - self._draining,
            "connections": self.client.opened,
            "reconnects": self.client.reconnects,
            **self._cpu,
        }

    def begin(self, start_ns: int, first_user: int, users: int) -> None:
        """Start the warm-up at `start_ns`. `first_user` is the number of this process's first user in a closed loop."""
        self.first_user, self.users = first_user, users
        self._start_ns = start_ns
        self._idle_users = [] if self.open else list(range(users))
        self._alarm.set(start_ns)

    def measure(self, start_ns: int) -> None:
        """Switch to the measurement at `start_ns`, without a pause. It ends `duration_s` later."""
        self._measure_ns = start_ns
        self._stop_ns = start_ns + int(self.load["duration_s"] * 1e9)
        self._alarm.set(time.monotonic_ns() if self.open else start_ns)
        gevent.spawn(self._measure_cpu)

    def _on_alarm(self) -> None:
        self._send_due() if self.open else self._start_users()

    def _send_due(self) -> None:
        """Open loop: send all requests that are due, and set the alarm for the next one."""
        now = time.monotonic_ns()
        for sent in range(BURST):
            if self._phase == WARMUP and self._measure_ns and now >= self._measure_ns:
                self._phase, self._start_ns, self._next_scheduled = MEASURED, self._measure_ns, 0
            if self._is_over(now) and self._phase == MEASURED and not self._has_unsent():
                self._phase, self._start_ns, self._next_scheduled = DRAIN, self._stop_ns, 0
            schedule = self.schedules[self._phase == MEASURED]
            if self._next_scheduled == len(schedule):
                if self._phase == WARMUP and self._measure_ns:
                    self._alarm.set(self._measure_ns)
                elif self._phase == MEASURED and self.events is not None:
                    self._alarm.set(self._stop_ns)
                return
            due = self._start_ns + schedule[self._next_scheduled]
            early = EARLY_NS if due - self._last_due > SPARSE_NS else 0
            if due - now > (0 if sent else early):
                # The first request of the measurement must not wait for the next one of the warm-up.
                switching = self._phase == WARMUP and self._measure_ns
                self._alarm.set((min(due, self._measure_ns) if switching else due) - early)
                return
            while now < due:
                now = time.monotonic_ns()
            index = self._next_scheduled * self.workers + self.worker
            self._next_scheduled += 1
            self._last_due = due
            self._send_scheduled(index, due)
            now = time.monotonic_ns()
        # More than a burst is overdue. Read the received responses first: a late read would count as latency.
        self._alarm.set(now)

    def _send_scheduled(self, index: int, due: int) -> None:
        phase = self._phase
        if self.client.outstanding >= self.max_outstanding:
            if phase == DRAIN:
                return
            self.dropped += phase == MEASURED
            more = (self.bodies.name(index), *(() if self.events is None else (0, 0, 0, 0)))
            self.recorder.add(due, 0, 0, due, index, 0, 0, NAN, NAN, NAN, 0, phase, DROPPED, *more)
            return
        request = self._request(index, due)
        self.client.send(request)
        self.late += phase == MEASURED and request.sent_ns - due > LATE_NS

    def _start_users(self) -> None:
        """Closed loop: start all idle users. Set the alarm for the next change of their number."""
        now = time.monotonic_ns()
        waiting, self._idle_users = self._idle_users, []
        for user in waiting:
            self._send_next(user, now)
        start = self._measure_ns or self._start_ns
        changes = [start + int(at * 1e9) for at in self._changes()] if self._measure_ns else []
        if later := [at for at in [self._measure_ns, *changes] if at > now]:
            self._alarm.set(min(later))

    def _changes(self) -> list[float]:
        """Return the seconds after the start of the measurement at which the number of users changes."""
        ends, at = [], 0.0
        for stage in self.load.get("timeline") or []:
            at += stage["duration_s"]
            ends.append(at)
        return ends[:-1]

    def _active_users(self, now: int) -> int:
        """Return the number of active users of all workers at the time `now`."""
        stages = self.load.get("timeline") or []
        elapsed_s = (now - self._measure_ns) / 1e9 if self._measure_ns and now >= self._measure_ns else 0.0
        for stage in stages:
            if elapsed_s < stage["duration_s"]:
                return int(stage["users"])
            elapsed_s -= stage["duration_s"]
        return int(stages[-1]["users"] if stages else self.load["users"])

    def _send_next(self, user: int, now: int) -> None:
        """Send the next request of a user, unless the load has ended or the stage has fewer users."""
        if self.finished.is_set() or (self._is_over(now) and self.events is None):
            return
        if self.first_user + user >= self._active_users(now):
            self._idle_users.append(user)
            return
        if self._phase == WARMUP and self._measure_ns and now >= self._measure_ns:
            self._phase, self._next_request = MEASURED, 0
        if self._phase == MEASURED and self._is_over(now):
            self._phase, self._next_request = DRAIN, 0
        index = self._next_request * self.workers + self.worker
        self._next_request += 1
        self.client.send(self._request(index, 0, user))

    def _request(self, index: int, intended_ns: int, user: int | None = None) -> PendingRequest:
        phase, name = self._phase, self.bodies.name(index)
        content = self.client.encode(self.bodies.at(phase, index), name)
        request = PendingRequest(phase, index, content, intended_ns, user)
        request.name = name
        if phase == DRAIN:
            self._draining += 1
        elif self.events is not None:
            request.stream = TokenStream(self.events.add, index, phase)
        return request

    def _record(self, request: PendingRequest, response: Response | None) -> None:
        end, intended = request.end_ns, request.intended_ns
        if request.phase == DRAIN:
            self._draining -= 1
            self._continue(request, response)
            return
        if response:
            headers = response.headers
            times = [number(headers.get(name)) for name in SERVER_TIMES]
            size, tokens, status = response.size, response.tokens, response.status
        else:
            times, size, tokens, status = [NAN, NAN, NAN], 0, 0, 0
        usage: tuple[int, ...] = ()
        if stream := request.stream:
            request.error, tokens = stream.outcome(request.error), stream.prompt_tokens
            usage = (stream.output_tokens, stream.cached_tokens, stream.finish, stream.counted)
        self.recorder.add(
            intended,
            request.sent_ns,
            request.first_ns or end,
            end,
            request.index,
            size,
            tokens,
            *times,
            status,
            request.phase,
            request.error,
            request.name,
            *usage,
        )
        if request.phase == WARMUP and request.error == OK:
            self.warmup_ms.append((end - intended) / 1e6)
        self._continue(request, response)

    def _continue(self, request: PendingRequest, response: Response | None) -> None:
        """Send the next request of a closed loop's user."""
        if request.user is None:
            return
        if request.error == CONNECTION or (response and response.status == TOO_MANY_REQUESTS):
            # Without a pause, a server that has ended or rejects would receive requests at the highest possible rate.
            seconds = number(response.headers.get("retry-after")) if response else NAN
            pause_s = seconds if seconds > 0 else PAUSE_S
            gevent.spawn_later(pause_s, lambda: self._send_next(request.user, time.monotonic_ns()))
        else:
            self._send_next(request.user, request.end_ns)

    def _measure_cpu(self) -> None:
        """Measure the CPU time of this process and its busiest second; then wait for the last responses."""
        # A full garbage collection takes milliseconds, which would add to the latency of a request. The duration of the
        # run bounds the garbage.
        gc.collect()
        gc.disable()
        gevent.sleep(max(0.0, (self._measure_ns - time.monotonic_ns()) / 1e9))
        first = last = (time.monotonic_ns(), time.process_time_ns())
        peak = 0.0
        while (left := (self._stop_ns - time.monotonic_ns()) / 1e9) > 0:
            # The last interval is not split: the CPU share of a tenth of a second is not meaningful.
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
        while time.monotonic() < deadline and (self.client.outstanding > self._draining or self._has_unsent()):
            gevent.sleep(0.02)
        self._alarm.disarm()
        gc.enable()
        self.finished.set()
        self.client.give_up()

    def _has_unsent(self) -> bool:
        if not self.open or self._phase == DRAIN:
            return False
        return self._phase == WARMUP or self._next_scheduled < len(self.schedules[MEASURED])

    def _is_over(self, now: int) -> bool:
        """Return whether the measurement has ended."""
        return bool(self._stop_ns) and now >= self._stop_ns


def number(text: str | None) -> float:
    """Return the number in a header; NaN without one."""
    if text:
        with contextlib.suppress(ValueError):
            return float(text)
    return NAN
