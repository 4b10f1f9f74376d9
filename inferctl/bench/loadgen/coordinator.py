"""Control a run of all workers: the warm-up until it is steady, one common start, and the end.

It runs in Locust's master, or in its only process.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gevent

from inferctl.bench.loadgen.recorder import exit_on_write_error
from inferctl.core import outputs

STEADY_WINDOWS, STEADY_SPREAD = 3, 0.10
LEAD_NS = 300_000_000
SILENT_S = 10


class Coordinator:
    """Exchange messages with the generator of each worker, and write the state of the run to `state-0.json`.

    It raises no exceptions: after an error, the run ends with `problem` in the state. If the state cannot be written,
    Locust ends with the number of the error.
    """

    def __init__(self, environment: Any, load: Mapping[str, Any]) -> None:
        self._environment, self.runner = environment, environment.runner
        self.load = load
        self.folder = Path(load["output"])
        self.workers = int(load["workers"])
        self._ready: dict[str, dict[str, Any]] = {}
        self._replies: dict[str, dict[str, Any]] = {}
        self._done: dict[str, dict[str, Any]] = {}
        self.state: dict[str, Any] = {"phase": "warm-up", "mode": load["mode"], "windows": [], "steady": False}
        for name, listener in {"ready": self._on_ready, "reply": self._on_reply, "done": self._on_done}.items():
            self.runner.register_message(f"inferctl-{name}", listener)

    def run(self) -> None:
        """Do the whole run, then end Locust."""
        try:
            try:
                self._run()
            except TimeoutError as error:
                self.publish(phase="failed", problem=str(error))
            except Exception as error:  # noqa: BLE001 - without this, any error would leave the run hanging for minutes
                traceback.print_exc()
                self.publish(phase="failed", problem=f"{type(error).__name__}: {error}")
        except SystemExit as end:
            self._environment.process_exit_code = end.code
        finally:
            self.runner.quit()

    def _run(self) -> None:
        self._wait_until(
            lambda: len(self._ready) >= self.workers,
            120,
            lambda: f"{len(self._ready)} of {self.workers} load workers connected",
        )
        if (numbers := [self._ready[node]["worker"] for node in self._order()]) != list(range(self.workers)):
            # The number of a worker selects its share of the schedule. With other numbers, a share would not be sent.
            raise TimeoutError(f"load workers {numbers} connected, but {self.workers} with numbers from 0 are required")
        started, user = time.monotonic_ns(), 0
        self.publish(warmup_start_ns=started)
        for node in self._order():
            users = self._ready[node]["users"]
            self._send(node, "begin", start_ns=started, first_user=user, users=users)
            user += users
        self._warm_up(started)
        cpu, start = time.process_time_ns(), time.monotonic_ns() + (LEAD_NS if self.workers > 1 else 1_000_000)
        end = start + int(self.load["duration_s"] * 1e9)
        for node in self._ready:
            self._send(node, "measure", start_ns=start)
        self.publish(phase="measure", measure_start_ns=start, measure_end_ns=end)
        self._watch(end)
        self.publish(phase="drain")
        own = time.process_time_ns() - cpu
        timeout_s = self.load["timeout_s"] + 15
        self._wait_until(
            lambda: len(self._done) >= self.workers,
            timeout_s,
            lambda: f"load workers {self._missing()} did not report the end of their run",
        )
        self.publish(**self._summary(own), phase="done")

    def _watch(self, end_ns: int) -> None:
        """Wait until `end_ns`.

        Raises `TimeoutError` if a worker sends no messages for 10 s. Locust marks such a worker after 3 s.
        """
        silent = 0
        while (left := (end_ns - time.monotonic_ns()) / 1e9) > 0:
            gevent.sleep(min(left, 1.0))
            missing = (
                [client for client in self.runner.clients.missing if client.id in self._ready]
                if self.workers > 1
                else []
            )
            silent = silent + 1 if missing else 0
            if silent > SILENT_S:
                lost = ", ".join(str(self._ready[client.id]["worker"]) for client in missing)
                raise TimeoutError(f"load worker {lost} stopped responding")

    def publish(self, **changes: Any) -> None:
        """Add `changes` to the state, and replace `state-0.json` atomically."""
        self.state.update(changes)
        with exit_on_write_error():
            outputs.replace(self.folder / "state-0.json", json.dumps(self.state), sync=False)

    def _warm_up(self, started: int) -> None:
        """Return when three consecutive windows agree within 10%, or after `warmup_s`."""
        closed = self.load["mode"] == "closed"
        enough = max(10, 2 * int(self.load["users"])) if closed else 10
        limit = started + int(self.load["warmup_s"] * 1e9)
        figures: list[float] = []
        while (start := time.monotonic_ns()) < limit:
            _, first = self._window()
            gevent.sleep(self.load["window_s"])
            done, events = self._window()
            # A few responses can agree by chance, so a slow server gets longer windows. A stream may last longer than
            # a window, so the events of a closed loop count instead of its responses.
            while (events - first if closed and events else len(done)) < enough and time.monotonic_ns() < limit:
                gevent.sleep(0.2)
                more, events = self._window()
                done += more
            done.sort()
            # An open loop completes the offered rate at any latency, so its latency must be steady instead.
            elapsed_s = (time.monotonic_ns() - start) / 1e9
            count = events - first or len(done)
            figures.append(count / elapsed_s if closed else done[len(done) // 2] if done else 0.0)
            last = figures[-STEADY_WINDOWS:]
            spread = max(last) - min(last)
            steady = len(last) == STEADY_WINDOWS and min(last) > 0 and spread <= STEADY_SPREAD * sum(last) / len(last)
            self.publish(windows=figures, steady=steady)
            if steady:
                return

    def _window(self) -> tuple[list[float], int]:
        """Return the latencies (ms) of the warm-up's responses of all workers since the last call, and all events."""
        self._replies = {}
        for node in self._ready:
            self._send(node, "window")
        self._wait_until(
            lambda: len(self._replies) >= len(self._ready), 20, lambda: "a load worker did not report its window"
        )
        replies = self._replies.values()
        latencies = [latency for reply in replies for latency in reply["latencies"]]
        return latencies, sum(reply["events"] for reply in replies)

    def _summary(self, own_cpu_ns: int) -> dict[str, Any]:
        """Return the figures that the validity check uses, of all workers together and of each."""
        parts = [self._done[node] for node in self._order()]
        busiest = max(parts, key=lambda part: part["cpu_ns"] / (part["cpu_wall_ns"] or 1))
        return {
            "workers": parts,
            "cpu_ns": busiest["cpu_ns"],
            "cpu_wall_ns": busiest["cpu_wall_ns"],
            "cpu_peak_percent": max(part["cpu_peak_percent"] for part in parts),
            "cpu_here_ns": sum(part["cpu_ns"] for part in parts) + (own_cpu_ns if self.workers > 1 else 0),
            "unfinished": sum(part["unfinished"] for part in parts),
        }

    def _order(self) -> list[str]:
        return sorted(self._ready, key=lambda node: int(self._ready[node]["worker"]))

    def _missing(self) -> str:
        return ", ".join(str(self._ready[node]["worker"]) for node in self._order() if node not in self._done)

    def _send(self, node: str, kind: str, **data: Any) -> None:
        self.runner.send_message(f"inferctl-{kind}", data, node)

    def _wait_until(self, condition: Callable[[], bool], seconds: float, message: Callable[[], str]) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > limit:
                raise TimeoutError(message())
            gevent.sleep(0.002)

    def _on_ready(self, msg: Any, **_: Any) -> None:
        self._ready[msg.node_id] = msg.data

    def _on_reply(self, msg: Any, **_: Any) -> None:
        self._replies[msg.node_id] = msg.data

    def _on_done(self, msg: Any, **_: Any) -> None:
        self._done[msg.node_id] = msg.data
