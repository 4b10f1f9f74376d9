"""Looks for the highest rate that one running server holds within an SLO: sends the probes that `goodput.find` asks for."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from inferctl.bench import stats
from inferctl.bench.judge import goodput, summary
from inferctl.bench.judge import probe as probes
from inferctl.bench.judge.probe import Probe
from inferctl.bench.judge.search_outcome import BudgetUse
from inferctl.bench.judge.validity import ACHIEVED_LIMIT
from inferctl.bench.load import generator, records
from inferctl.bench.measure.outcome import Measurement
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Load, Run, Search
from inferctl.errors import InferctlError

BURST_S, BURST_USERS = 4.0, 32
# More answers than a p99's interval needs: the last ones of a probe may come late.
ENOUGH = round(1.15 * stats.needed(0.99))
WINDOW_S, SHORTEST_S = 0.5, 4.0
# A queue's length now is much like that a moment ago, so windows say less than as many independent ones: intervals are this much wider.
# With it, of 100 simulated queues at 85, 90 and 95 % load 0, 2 and 4 were taken for hopeless within 8 s, at 115 % 99.
CORRELATED = 2.0
SETTLE_S = 30.0
# Start of the load generator, besides the warm-up. A probe takes LONGER than `probe_s` on average: it needs more
# responses, or is measured again.
START_S, LONGER = 3.0, 1.5
# Measurements of a search besides those that halve the gap between two rates, and that gap, relative to the rates.
MEASUREMENTS, GAP = 22, 0.25
# The same for a search with little time.
SHORT_MEASUREMENTS, SHORT_GAP = len(goodput.SHORT_SWEEP) + goodput.RESERVE, 0.5
_OF_OTHER_SHAPE = ("auto_users", "stages", "trace", "spike", "capacity_percent")

Take = Callable[[Load, workload.Workload, Path, int, Callable[[], None]], Measurement]


class Hopeless(Exception):  # noqa: N818 - no error: the answer came sooner
    """The backlog of a probe grows without doubt."""


@dataclass(frozen=True)
class Forecast:
    """How long a search of one server should take, and how close the rates around its result will be.

    `short`: with fewer rates at first. `enough`: whether the time is enough for a search at all.
    """

    seconds: float
    resolution: float
    short: bool = False
    enough: bool = True


def forecast(settings: Search, load: Load, budget_s: float | None = None) -> Forecast:
    """Return what a search takes, or what `budget_s` seconds for one server buy."""
    around = min(load.warmup_s, 4 * load.window_s) + START_S
    first = load.warmup_s + BURST_S + START_S
    halvings = math.ceil(math.log2(max(1.0, GAP / settings.resolution)))
    whole = first + (MEASUREMENTS + halvings) * (LONGER * settings.probe_s + around)
    if budget_s is None or whole <= budget_s:
        return Forecast(whole, settings.resolution)
    affordable = math.floor((budget_s - first) / (settings.probe_s + around)) - SHORT_MEASUREMENTS
    if affordable < 0:
        least = first + SHORT_MEASUREMENTS * (settings.probe_s + around)
        return Forecast(least, SHORT_GAP, short=True, enough=False)
    return Forecast(budget_s, max(settings.resolution, SHORT_GAP / 2**affordable), short=True)


@dataclass
class Searcher:
    """Probes one server. `take` measures one load in a folder; `settle` waits until the server is idle again; `told`
    hears of each probe. `budget` is the share of requests that may fail at a rate within the SLO, `seconds` the time
    that the search may take."""

    settings: Search
    slo_p99_ms: float
    load: Load
    corpus: str
    seed: int
    folder: Path
    take: Take
    settle: Callable[[float], object]
    told: Callable[[Probe], None]
    budget: float = 0.0
    seconds: float | None = None
    _until: float = field(default=math.inf, init=False)
    _taken: list[tuple[Probe, Measurement]] = field(default_factory=list, init=False)
    _count: int = field(default=0, init=False)

    def run(self) -> Measurement:
        """Search; returns the measurement at the best rate (else at the lowest that lasted), with the result as its `search`.

        Raises `InferctlError` when no probe lasted to its end.
        """
        begun, budget = time.monotonic(), None
        if self.seconds is not None:
            self._until = begun + self.seconds
            short = forecast(self.settings, self.load, self.seconds).short
            budget = goodput.Budget(self.seconds, self._left, self._cost, short)
        ceiling = None if self.settings.start_rate else self._ceiling()
        found = goodput.find(self.settings, self.slo_p99_ms, ceiling, self.measure, budget)
        if self.seconds is not None:
            found = replace(found, budget=BudgetUse(self.seconds, round(time.monotonic() - begun, 1)))
        lasted = [(probe, made) for probe, made in self._taken if not probe.ended_early and probe.n]
        if not lasted:
            raise InferctlError(
                f"no probe lasted: {found.reason}", "give `search.start_rate` a rate that the server can do"
            )
        best = [made for probe, made in lasted if probe.rate == found.max_goodput_rps and probe.stage == "confirm"]
        chosen = best[-1] if best else min(lasted, key=lambda pair: pair[0].rate)[1]
        return replace(chosen, search=found.as_dict())

    def _left(self) -> float:
        return self._until - time.monotonic()

    def _around(self) -> float:
        return min(self.load.warmup_s, 4 * self.load.window_s) + START_S

    def _cost(self, rate: float) -> float:
        """Return seconds of one measurement at `rate`."""
        seconds = max(self.settings.probe_s, ENOUGH / rate)
        return min(seconds, max(self.settings.probe_s, self.settings.max_probe_s)) + self._around()

    def _ceiling(self) -> float:
        """Requests/s of a closed loop that always has work waiting. Its end is also the server's warm-up."""
        users = max(BURST_USERS, self.load.users)
        burst = self._shaped(mode="closed", users=users, duration_s=BURST_S, warmup_s=self.load.warmup_s)
        work = workload.draw(burst, self.corpus, self.seed)
        made = self.take(burst, work, self._next("ceiling"), self.seed, lambda: None)
        found = summary.summarise([made.part])
        if not found["requests_per_s"]:
            raise InferctlError(f"the server answered nothing to {users} users", f"its log is {self.folder}/server.log")
        return float(found["requests_per_s"])

    def measure(self, rate: float, stage: str, earlier: Sequence[Probe]) -> Probe:
        """Offer `rate` once and judge it together with the `earlier` probes of that rate."""
        seconds = max(self.settings.probe_s, ENOUGH / rate)
        if stage == "confirm":
            seconds = max(seconds, self.load.duration_s)
        # Once it is known how much answers at this rate are alike, as many as say what enough independent ones would.
        alike = (
            next((probe.variance_inflation for probe, _ in reversed(self._taken) if probe.rate == rate), None) or 1.0
        )
        seconds = max(seconds, (ENOUGH * alike - (earlier[-1].n if earlier else 0)) / rate)
        seconds = min(seconds, max(self.settings.probe_s, self.settings.max_probe_s))
        seconds = min(seconds, max(SHORTEST_S, self._left() - self._around()))
        # One draw of gaps for all rates of the search: what differs between them is the rate. Each further look at a rate has its own.
        looks = sum(probe.rate == rate for probe, _ in self._taken)
        seed = self.seed + looks + {"confirm": 100, "bound": 200}.get(stage, 0)
        warmup_s = min(self.load.warmup_s, 4 * self.load.window_s)
        load = self._shaped(mode="open", rate=rate, duration_s=seconds, warmup_s=warmup_s)
        self.settle(SETTLE_S)
        place, growing = self._next(f"{stage}-{rate:g}"), None
        work = workload.draw(load, self.corpus, seed)
        try:
            made = self.take(load, work, place, seed, Backlog(place, work, rate).check)
        except Hopeless as reason:
            growing = str(reason)
            made = _cut_short(load, work, place)
        before = [taken for probe, taken in self._taken if probe in earlier]
        probe = self._judged(rate, stage, seed, [*before, made], growing)
        self._taken.append((probe, made))
        self.told(probe)
        return probe

    def _shaped(self, **changes: Any) -> Load:
        kept = {key: value for key, value in self.load.model_dump().items() if key not in _OF_OTHER_SHAPE}
        return Load.model_validate({**kept, **changes})

    def _next(self, name: str) -> Path:
        self._count += 1
        place = self.folder / f"{self._count:02d}-{name}"
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _judged(self, rate: float, stage: str, seed: int, parts: Sequence[Measurement], growing: str | None) -> Probe:
        found = summary.summarise([one.part for one in parts])
        figures = {**found, "errors": _by_kind(found["errors"], [one.part for one in parts])}
        cpu = max((one.resources.get("client_cpu_percent", 0.0) for one in parts), default=0.0) or None
        return probes.make(
            stage,
            rate,
            seed,
            figures,
            probes.judge(figures, self.slo_p99_ms, cpu, growing, self.budget),
            client_cpu_percent=cpu,
            ended_early=growing is not None,
            runs=len(parts),
            records=[
                file.relative_to(self.folder.parent.parent).as_posix()
                for one in parts
                for file in records.files(one.folder)
            ],
        )


class Backlog:
    """Watches the records of an open loop while it runs; `check` raises `Hopeless` when the server falls ever further behind."""

    def __init__(self, folder: Path, work: workload.Workload, rate: float) -> None:
        self._folder, self._schedule, self._rate = folder, work.schedule_ns, rate
        self._tails: dict[Path, records.Tail] = {}
        self._ends: list[int] = []
        self._latencies: list[float] = []

    def check(self) -> None:
        """Raise `Hopeless` when, for certain, unanswered requests grow by more than 2 % of the rate and latency grows too."""
        state = generator.read_state(self._folder)
        if state.get("phase") != "measure":
            return
        for file in records.files(self._folder):
            new = self._tails.setdefault(file, records.Tail(file)).read_new()
            if len(new):
                measured = new[new["phase"] == records.MEASURED]
                self._ends += measured["end_ns"].tolist()
                self._latencies += records.latency_ms(measured).tolist()
        passed = (time.monotonic_ns() - state["measure_start_ns"]) / 1e9
        if passed >= SHORTEST_S and (reason := self.growing(state["measure_start_ns"], passed)):
            raise Hopeless(reason)

    def growing(self, start_ns: int, passed_s: float) -> str | None:
        """How the backlog grew within `passed_s` seconds, in words; None when that is not certain."""
        ends = (np.array(self._ends, np.float64) - start_ns) / 1e9
        latencies = np.array(self._latencies)
        # The newest records may still be in the load generator's buffer.
        edges = np.arange(WINDOW_S, passed_s - WINDOW_S, WINDOW_S)
        waiting = [
            float(np.count_nonzero(self._schedule < edge * 1e9)) - float(np.count_nonzero(ends < edge))
            for edge in edges
        ]
        windows = [latencies[(ends >= edge - WINDOW_S) & (ends < edge)] for edge in edges]
        known = [(edge, float(np.median(inside))) for edge, inside in zip(edges, windows, strict=True) if len(inside)]
        backlog = stats.slope([float(edge) for edge in edges], waiting)
        latency = stats.slope([edge for edge, _ in known], [value for _, value in known])
        if not backlog or not latency:
            return None
        (grows, unsure), (bends, unclear) = backlog, latency
        if grows - CORRELATED * unsure > (1 - ACHIEVED_LIMIT) * self._rate and bends - CORRELATED * unclear > 0:
            return f"the backlog grew by {grows:.1f} requests and latency by {bends:.0f} ms a second: ended early"
        return None


def _cut_short(load: Load, work: workload.Workload, place: Path) -> Measurement:
    """What a probe that was ended early left: its window ends with its last answer."""
    state = generator.read_state(place)
    rows = generator.read_records(place, state)
    start = int(state["measure_start_ns"])
    end = max(start + 1, int(rows["end_ns"].max()))
    offered = int(np.count_nonzero(work.schedule_ns < end - start))
    part = summary.Part(rows, start, end, load.inputs_per_request, offered)
    return Measurement(Run("cut", 0), 0.0, part, state, {}, place, {}, 0)


def settle(ask: Callable[[], object], patience_s: float, idle_s: float | None) -> float:
    """Ask one thing at a time until an answer takes no longer than twice `idle_s`, or `patience_s` is over; returns the last answer's seconds."""
    until = time.monotonic() + patience_s
    while True:
        begun = time.monotonic()
        with contextlib.suppress(InferctlError):
            ask()
        took = time.monotonic() - begun
        if idle_s is None or took <= 2 * idle_s + 0.005 or time.monotonic() > until:
            return took
        time.sleep(0.05)


def _by_kind(errors: dict[str, int], parts: Sequence[summary.Part]) -> dict[str, int]:
    """Errors by kind, with 429 apart from other HTTP statuses: the server refused, it did not break."""
    full = sum(int(np.sum(part.measured["status"] == 429)) for part in parts)
    rest = {**errors, "HTTP status": errors.get("HTTP status", 0) - full, "429": full}
    return {name: count for name, count in rest.items() if count > 0}
