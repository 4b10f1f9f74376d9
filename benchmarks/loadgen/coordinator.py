"""Takes all generators through a run: warm-up until steady, one common start, the end. In Locust's master, or in its only process."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gevent

from loadgen import clock

STEADY_WINDOWS, STEADY_SPREAD = 3, 0.10
LEAD_NS = 300_000_000
TRIPS = 20
SILENT_S = 10


class Coordinator:
    """Talks to each generator (`worker`) by messages through Locust's runner; writes `state-0.json` where the run is.

    Raises nothing: what goes wrong ends the run with `problem` in the state.
    """

    def __init__(self, environment: Any, load: Mapping[str, Any], files: Callable[[], dict[str, bytes]]) -> None:
        self.runner, self.stats = environment.runner, environment.stats
        self.load, self._files = load, files
        self.folder = Path(load["output"])
        self.workers = int(load["workers"]) + int(load.get("remote_workers", 0))
        self._ready: dict[str, dict[str, Any]] = {}
        self._complete = False
        self._replies: dict[str, dict[str, Any]] = {}
        self._done: dict[str, dict[str, Any]] = {}
        self._offsets: dict[str, tuple[clock.Offset, clock.Offset]] = {}
        self._here = clock.machine()
        self.state: dict[str, Any] = {"phase": "warm-up", "mode": load["mode"], "windows": [], "steady": False}
        listeners = {"need": self._send_files, "ready": self._hear_ready, "reply": self._hear_reply}
        for name, listener in {**listeners, "records": self._keep, "done": self._hear_done}.items():
            self.runner.register_message(f"inferctl-{name}", listener)

    def run(self) -> None:
        """The whole run, then the end of Locust."""
        try:
            self._run()
        except TimeoutError as error:
            self.announce(phase="failed", problem=str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is: a run that nobody ends hangs for minutes
            traceback.print_exc()
            self.announce(phase="failed", problem=f"{type(error).__name__}: {error}")
        finally:
            self.runner.quit()

    def _run(self) -> None:
        self._await(
            lambda: len(self._ready) >= self.workers,
            120,
            lambda: f"{len(self._ready)} of {self.workers} load workers came",
        )
        if (numbers := [self._ready[node]["worker"] for node in self._order()]) != list(range(self.workers)):
            # Their numbers share the schedule out, and these would leave a part of it to nobody.
            raise TimeoutError(
                f"load workers {numbers} came where {self.workers} should be numbered from 0: "
                "there are more of them, or one is left of a run that was cut short (it ends within a minute)"
            )
        self._complete = True
        offsets = {node: self._offset(node) for node in self._ready}
        started, user = time.monotonic_ns(), 0
        self.announce(warmup_start_ns=started)
        for node in self._order():
            users = self._ready[node]["users"]
            self._tell(node, "begin", start_ns=started + offsets[node].ns, first_user=user, users=users)
            user += users
        self._warm_up(started)
        self.stats.reset_all()
        cpu, begun = time.process_time_ns(), time.monotonic_ns() + (LEAD_NS if self.workers > 1 else 1_000_000)
        end = begun + int(self.load["duration_s"] * 1e9)
        for node in self._ready:
            self._tell(node, "measure", start_ns=begun + offsets[node].ns)
        self.announce(phase="measure", measure_start_ns=begun, measure_end_ns=end)
        self._watch(end)
        self.announce(phase="drain")
        own = time.process_time_ns() - cpu
        patience = self.load["timeout_s"] + 15
        self._await(
            lambda: len(self._done) >= self.workers,
            patience,
            lambda: f"load workers {self._missing()} never said that they were done",
        )
        self._offsets = {node: (first, self._offset(node)) for node, first in offsets.items()}
        total = self.stats.total
        rounded = {f"p{q * 100:g}": total.get_response_time_percentile(q) for q in (0.5, 0.9, 0.95, 0.99)}
        self.announce(**self._account(own), locust_percentiles_ms=rounded if self.workers == 1 else None)
        self.announce(phase="done", done_ns=time.monotonic_ns())

    def _watch(self, end_ns: int) -> None:
        """Wait until `end_ns`. Raises `TimeoutError` when a worker has said nothing for long: Locust marks it after three seconds."""
        silent = 0
        while (left := (end_ns - time.monotonic_ns()) / 1e9) > 0:
            gevent.sleep(min(left, 1.0))
            missing = [one for one in self.runner.clients.missing if one.id in self._ready] if self.workers > 1 else []
            silent = silent + 1 if missing else 0
            if silent > SILENT_S:
                lost = ", ".join(str(self._ready[client.id]["worker"]) for client in missing)
                raise TimeoutError(f"load worker {lost} was lost")

    def announce(self, **changes: Any) -> None:
        """Publish where the run is, atomically."""
        self.state.update(changes)
        part = self.folder / ".state-0.json"
        part.write_text(json.dumps(self.state))
        part.rename(self.folder / "state-0.json")

    def _warm_up(self, started: int) -> None:
        """Return when three windows in a row agree within 10 %, or when the time for it is up."""
        closed = self.load["mode"] == "closed"
        enough = max(10, 2 * int(self.load["users"])) if closed else 10
        limit = started + int(self.load["warmup_s"] * 1e9)
        figures: list[float] = []
        while (begun := time.monotonic_ns()) < limit:
            self._window()
            gevent.sleep(self.load["window_s"])
            done = self._window()
            # Too few answers agree by chance: a slow server gets longer windows.
            while len(done) < enough and time.monotonic_ns() < limit:
                gevent.sleep(0.2)
                done += self._window()
            done.sort()
            # An open loop completes what is offered whatever the server does, so there the latency must settle instead.
            passed = (time.monotonic_ns() - begun) / 1e9
            figures.append(len(done) / passed if closed else done[len(done) // 2] if done else 0.0)
            last = figures[-STEADY_WINDOWS:]
            spread = max(last) - min(last)
            steady = len(last) == STEADY_WINDOWS and min(last) > 0 and spread <= STEADY_SPREAD * sum(last) / len(last)
            self.announce(windows=figures, steady=steady)
            if steady:
                return

    def _window(self) -> list[float]:
        """Latencies (ms) of the warm-up's answers since the last call, of all workers."""
        return [latency for reply in self._ask("window").values() for latency in reply["latencies"]]

    def _offset(self, node: str) -> clock.Offset:
        if self._ready[node]["machine"] == self._here:
            return clock.Offset()
        trips = []
        for _ in range(TRIPS):
            sent = time.monotonic_ns()
            reply = self._ask("clock", node)[node]
            trips.append((sent, reply["now_ns"], reply["heard_ns"]))
        return clock.offset(trips)

    def _account(self, own_cpu_ns: int) -> dict[str, Any]:
        """What validity judges: the busiest worker's CPU, everything late and unfinished, and what is unknown of the clocks."""
        parts = []
        for node in self._order():
            first, last = self._offsets[node]
            here = self._ready[node]["machine"] == self._here
            drift = abs(last.ns - first.ns) + last.uncertainty_ns
            clocks = {
                "clock_offset_ns": first.ns,
                "clock_uncertainty_ns": max(first.uncertainty_ns, drift),
                "here": here,
            }
            parts.append({**self._done[node], **clocks})
        busiest = max(parts, key=lambda part: part["cpu_ns"] / part["cpu_wall_ns"])
        return {
            "workers": parts,
            "cpu_ns": busiest["cpu_ns"],
            "cpu_wall_ns": busiest["cpu_wall_ns"],
            "cpu_peak_percent": max(part["cpu_peak_percent"] for part in parts),
            "cpu_here_ns": sum(part["cpu_ns"] for part in parts if part["here"])
            + (own_cpu_ns if self.workers > 1 else 0),
            "unfinished": sum(part["unfinished"] for part in parts),
            "clock_uncertainty_ns": max(part["clock_uncertainty_ns"] for part in parts),
        }

    def _order(self) -> list[str]:
        return sorted(self._ready, key=lambda node: int(self._ready[node]["worker"]))

    def _missing(self) -> str:
        return ", ".join(str(self._ready[node]["worker"]) for node in self._order() if node not in self._done)

    def _tell(self, node: str, kind: str, **data: Any) -> None:
        self.runner.send_message(f"inferctl-{kind}", data, node)

    def _ask(self, kind: str, only: str | None = None) -> dict[str, dict[str, Any]]:
        nodes = [only] if only else list(self._ready)
        self._replies = {}
        for node in nodes:
            self._tell(node, kind)
        self._await(lambda: len(self._replies) >= len(nodes), 20, lambda: f"a load worker did not answer to {kind}")
        return self._replies

    def _await(self, met: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
        limit = time.monotonic() + seconds
        while not met():
            if time.monotonic() > limit:
                raise TimeoutError(otherwise())
            gevent.sleep(0.002)

    def _send_files(self, msg: Any, **_: Any) -> None:
        # A worker elsewhere has no folder in common with us.
        self._tell(msg.node_id, "load", load=dict(self.load), files=self._files(), workers=self.workers)

    def _hear_ready(self, msg: Any, **_: Any) -> None:
        # The schedule is shared out by then: who comes later has no part in this run, and waits for the next.
        if not self._complete:
            self._ready[msg.node_id] = msg.data

    def _hear_reply(self, msg: Any, **_: Any) -> None:
        if msg.node_id in self._ready:
            self._replies[msg.node_id] = {**msg.data, "heard_ns": time.monotonic_ns()}

    def _keep(self, msg: Any, **_: Any) -> None:
        # Of a run that was cut short, whose worker has not noticed yet.
        if msg.node_id not in self._ready:
            return
        with (self.folder / f"requests-{int(msg.data['worker'])}.bin").open("ab") as file:
            file.write(msg.data["content"])

    def _hear_done(self, msg: Any, **_: Any) -> None:
        if msg.node_id in self._ready:
            self._done[msg.node_id] = msg.data
