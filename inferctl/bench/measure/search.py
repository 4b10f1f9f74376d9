"""Send the probes that `goodput.find` requests: the search for the highest rate at which a server meets the SLO."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from inferctl.bench import stats
from inferctl.bench.judge import goodput, summary
from inferctl.bench.judge import probe as probes
from inferctl.bench.judge.probe import Probe
from inferctl.bench.judge.search_outcome import BudgetUse
from inferctl.bench.judge.validity import ACHIEVED_LIMIT
from inferctl.bench.load import load_run, records
from inferctl.bench.measure.outcome import Measurement, run_records
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Run
from inferctl.bench.plan.sections import Search
from inferctl.bench.plan.shape import Load
from inferctl.bench.plan.tokens import Tokenizer
from inferctl.core.errors import InferctlError

BURST_S, BURST_USERS, GENERATION_BURST_S = 4.0, 32, 15.0
# More samples than the interval of a p99 needs: the last responses of a probe may come late.
ENOUGH_SAMPLES = round(1.15 * stats.needed(0.99))
WINDOW_S, MIN_PROBE_S = 0.5, 4.0
# Queue lengths of consecutive windows are correlated, so intervals are this much wider. With it, of 100 simulated
# queues at 85, 90 and 95% load, 0, 2 and 4 counted as saturated within 8 s, and 99 at 115% load.
AUTOCORRELATION_FACTOR = 2.0
IDLE_TIMEOUT_S = 30.0
# Seconds to start the load generator, in addition to the warm-up. A probe takes PROBE_OVERRUN x `probe_s` on average:
# it needs more responses, or is measured again.
START_S, PROBE_OVERRUN = 3.0, 1.5
# Measurements of a search in addition to those that halve the gap between two rates; that gap, relative to the rates.
MEASUREMENTS, GAP = 22, 0.25
# The same for a search with a short budget.
SHORT_MEASUREMENTS, SHORT_GAP = len(goodput.SHORT_SWEEP) + goodput.RESERVE, 0.5

MeasureLoad = Callable[[workload.Workload, Path, Callable[[], None]], Measurement]


class ServerSaturated(Exception):  # noqa: N818 - not an error: the probe has its result early
    """The backlog of a probe grows; the message says how."""


@dataclass(frozen=True)
class Forecast:
    """The duration of a search of one server, and the expected distance between the rates around its result.

    `short`: the sweep has fewer rates. `enough`: the time is enough for a search.
    """

    seconds: float
    resolution: float
    short: bool = False
    enough: bool = True


def forecast(settings: Search, load: Load, budget_s: float | None = None) -> Forecast:
    """Return duration and resolution of a search, or the resolution that `budget_s` seconds allow for one server."""
    overhead_s = min(load.warmup_s, 4 * load.window_s) + START_S
    first = load.warmup_s + BURST_S + START_S
    halvings = math.ceil(math.log2(max(1.0, GAP / settings.resolution)))
    full = first + (MEASUREMENTS + halvings) * (PROBE_OVERRUN * settings.probe_s + overhead_s)
    if budget_s is None or full <= budget_s:
        return Forecast(full, settings.resolution)
    affordable = math.floor((budget_s - first) / (settings.probe_s + overhead_s)) - SHORT_MEASUREMENTS
    if affordable < 0:
        least = first + SHORT_MEASUREMENTS * (settings.probe_s + overhead_s)
        return Forecast(least, SHORT_GAP, short=True, enough=False)
    return Forecast(budget_s, max(settings.resolution, SHORT_GAP / 2**affordable), short=True)


@dataclass
class Searcher:
    """Searches one server for the highest rate within the SLO.

    - `measure_load`: measures one load in a folder.
    - `wait_until_idle`: waits until the server is idle; receives a timeout in seconds.
    - `on_probe`: receives each probe.
    - `budget`: the share of requests that may fail at a rate within the SLO.
    - `seconds`: the time limit of the search.
    - `tokenizer`: counts the tokens of prompts.

    If the load has bounds of generation, percentiles and `slo_p99_ms` are in percent of them.
    """

    settings: Search
    slo_p99_ms: float
    load: Load
    corpus: str
    seed: int
    folder: Path
    measure_load: MeasureLoad
    wait_until_idle: Callable[[float], object]
    on_probe: Callable[[Probe], None]
    budget: float
    seconds: float | None = None
    tokenizer: Tokenizer | None = None
    _deadline: float = field(default=math.inf, init=False)
    _measured: list[tuple[Probe, Measurement]] = field(default_factory=list, init=False)
    _count: int = field(default=0, init=False)

    def run(self) -> Measurement:
        """Search, and return the measurement at the best rate, with the result as its `search`.

        If no rate meets the SLO, the measurement is the one at the lowest rate that ran to its end. Raises
        `InferctlError` if no probe ran to its end.
        """
        start, budget = time.monotonic(), None
        if self.seconds is not None:
            self._deadline = start + self.seconds
            short = forecast(self.settings, self.load, self.seconds).short
            budget = goodput.Budget(self.seconds, self._remaining_s, self._cost_s, short)
        ceiling = None if self.settings.start_rate else self._ceiling()
        found = goodput.find(self.settings, self.slo_p99_ms, ceiling, self.measure, budget)
        if self.seconds is not None:
            found = replace(found, budget=BudgetUse(self.seconds, round(time.monotonic() - start, 1)))
        complete = [(probe, measurement) for probe, measurement in self._measured if not probe.ended_early and probe.n]
        if not complete:
            raise InferctlError(
                f"no probe ran to its end: {found.reason}",
                "set `search.start_rate` to a rate that the server can do",
            )
        best = next((measurement for probe, measurement in complete if probe is found.best), None)
        # The last measurement of a rate is pooled with the earlier ones.
        chosen = best or min(reversed(complete), key=lambda pair: pair[0].rate)[1]
        bounds = self.load.generation and self.load.generation.bounds
        # Other load next to any probe can have decided the result.
        noise = {
            key: max(run.resources.get(key, 0.0) for _, run in self._measured)
            for key in chosen.resources.keys() & {"other_cores", "stolen_cores"}
        }
        return replace(
            chosen,
            resources={**chosen.resources, **noise},
            search=found.as_dict() | ({"bounds_ms": bounds} if bounds else {}),
        )

    def _remaining_s(self) -> float:
        return self._deadline - time.monotonic()

    def _overhead_s(self) -> float:
        return min(self.load.warmup_s, 4 * self.load.window_s) + START_S

    def _cost_s(self, rate: float) -> float:
        """Return the duration of one measurement at `rate`."""
        seconds = max(self.settings.probe_s, ENOUGH_SAMPLES / rate)
        return min(seconds, max(self.settings.probe_s, self.settings.max_probe_s)) + self._overhead_s()

    def _ceiling(self) -> float:
        """Return requests/s of a closed loop that always has requests waiting. It also warms up the server."""
        users = max(BURST_USERS, self.load.users)
        generates = self.load.generation is not None
        burst = self.load.as_single_stage(users=users, duration_s=GENERATION_BURST_S if generates else BURST_S)
        work = workload.draw(burst, self.corpus, self.seed, self.tokenizer)
        found = self.measure_load(work, self._next_folder("ceiling"), lambda: None).summary
        rate = found["requests_per_s"]
        if generates:
            # Whole responses are few in a short window.
            rate = found["output_tokens_per_s"] / (found["output_tokens_per_request"] or 1)
        if not rate:
            raise InferctlError(f"the server completed no request of {users} users", f"see {self.folder}/server.log")
        return float(rate)

    def measure(self, rate: float, stage: str, earlier: Sequence[Probe]) -> Probe:
        """Offer `rate` once, and judge the result together with the `earlier` probes of that rate."""
        seconds = max(self.settings.probe_s, ENOUGH_SAMPLES / rate)
        if stage == "confirm":
            seconds = max(seconds, self.load.duration_s)
        # If the responses at this rate are autocorrelated, more of them make up the effective sample size.
        known = next((probe.variance_inflation for probe, _ in reversed(self._measured) if probe.rate == rate), None)
        seconds = max(seconds, (ENOUGH_SAMPLES * (known or 1.0) - (earlier[-1].n if earlier else 0)) / rate)
        seconds = min(seconds, max(self.settings.probe_s, self.settings.max_probe_s))
        seconds = min(seconds, max(MIN_PROBE_S, self._remaining_s() - self._overhead_s()))
        # All rates of the search share one draw of gaps, so that they differ in the rate only. A repeated measurement
        # of a rate has a draw of its own.
        repeats = sum(probe.rate == rate for probe, _ in self._measured)
        seed = self.seed + repeats + {"confirm": 100, "bound": 200}.get(stage, 0)
        warmup_s = min(self.load.warmup_s, 4 * self.load.window_s)
        load = self.load.as_single_stage(mode="open", rate=rate, duration_s=seconds, warmup_s=warmup_s)
        self.wait_until_idle(IDLE_TIMEOUT_S)
        place, growth = self._next_folder(f"{stage}-{rate:g}"), None
        work = workload.draw(load, self.corpus, seed, self.tokenizer)
        try:
            measurement = self.measure_load(work, place, Backlog(place, work, rate).check)
        except ServerSaturated as reason:
            growth = str(reason)
            measurement = _partial_measurement(work, place)
        before = [run for probe, run in self._measured if probe in earlier]
        probe = self._judged(rate, stage, seed, [*before, measurement], growth)
        self._measured.append((probe, replace(measurement, pooled=before)))
        self.on_probe(probe)
        return probe

    def _next_folder(self, name: str) -> Path:
        self._count += 1
        place = self.folder / f"{self._count:02d}-{name}"
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _judged(self, rate: float, stage: str, seed: int, runs: Sequence[Measurement], growth: str | None) -> Probe:
        found = summary.summarize([run.records for run in runs])
        # The server rejects a request because of the rate: its 429 is a kind of its own here.
        kinds = {**summary.failures(found), "429": found["rejected"], "dropped": found["dropped"]}
        found = {**found, "errors": {name: count for name, count in kinds.items() if count}}
        cpu = max((run.resources.get("client_cpu_percent", 0.0) for run in runs), default=0.0) or None
        return probes.make(
            stage,
            rate,
            seed,
            found,
            probes.judge(found, self.slo_p99_ms, cpu, growth, self.budget),
            client_cpu_percent=cpu,
            ended_early=growth is not None,
            runs=len(runs),
            records=[
                file.relative_to(self.folder.parent.parent).as_posix()
                for run in runs
                for file in records.files(run.folder)
            ],
        )


class Backlog:
    """Reads the records of an open loop while it runs. `check` ends the loop if the server is saturated."""

    def __init__(self, folder: Path, work: workload.Workload, rate: float) -> None:
        self._folder, self._schedule, self._rate = folder, work.schedule_ns, rate
        self._tails: dict[Path, records.Tail] = {}
        self._ends: list[int] = []
        self._latencies: list[float] = []

    def check(self) -> None:
        """Raise `ServerSaturated` if the backlog grows by more than 2% of the rate, and latency grows too.

        Both must be certain: their 95% intervals are above these limits.
        """
        state = load_run.read_state(self._folder)
        if state.get("phase") != "measure":
            return
        for file in records.files(self._folder):
            new = self._tails.setdefault(file, records.Tail(file)).read_new()
            if len(new):
                measured = new[new["phase"] == records.MEASURED]
                self._ends += measured["end_ns"].tolist()
                self._latencies += records.latency_ms(measured).tolist()
        passed = (time.monotonic_ns() - state["measure_start_ns"]) / 1e9
        if passed >= MIN_PROBE_S and (reason := self.growth(state["measure_start_ns"], passed)):
            raise ServerSaturated(reason)

    def growth(self, start_ns: int, passed_s: float) -> str | None:
        """Return how the backlog grew within `passed_s` seconds, in words; None if growth is not certain."""
        ends = (np.array(self._ends, np.float64) - start_ns) / 1e9
        latencies = np.array(self._latencies)
        # The newest records may still be in the buffer of the load generator.
        edges = np.arange(WINDOW_S, passed_s - WINDOW_S, WINDOW_S)
        waiting = [
            float(np.count_nonzero(self._schedule < edge * 1e9)) - float(np.count_nonzero(ends < edge))
            for edge in edges
        ]
        windows = [latencies[(ends >= edge - WINDOW_S) & (ends < edge)] for edge in edges]
        medians = [
            (float(edge), float(np.median(inside))) for edge, inside in zip(edges, windows, strict=True) if len(inside)
        ]
        backlog = stats.slope([float(edge) for edge in edges], waiting)
        latency = stats.slope([edge for edge, _ in medians], [value for _, value in medians])
        if not backlog or not latency:
            return None
        (requests_per_s, backlog_half), (ms_per_s, latency_half) = backlog, latency
        backlog_grows = requests_per_s - AUTOCORRELATION_FACTOR * backlog_half > (1 - ACHIEVED_LIMIT) * self._rate
        if backlog_grows and ms_per_s - AUTOCORRELATION_FACTOR * latency_half > 0:
            return (
                f"stopped early: the backlog grew by {requests_per_s:.1f} requests per second "
                f"and latency by {ms_per_s:.0f} ms per second"
            )
        return None


def _partial_measurement(work: workload.Workload, place: Path) -> Measurement:
    """Return the measurement of a probe that ended early. Its window ends with its last response."""
    state = load_run.read_state(place)
    rows = records.merge(place)
    start = int(state["measure_start_ns"])
    end = max(start + 1, int(rows["end_ns"].max()))
    offered = int(np.count_nonzero(work.schedule_ns < end - start))
    part = run_records(work.load, rows, start, end, offered, records.merge_events(place))
    return Measurement(Run("ended-early", 0), 0.0, part, state, {}, place, {}, 0)


def wait_until_idle(request: Callable[[], object], timeout_s: float, idle_s: float | None) -> float:
    """Send single requests until one takes at most twice `idle_s`, or until `timeout_s`; return its seconds."""
    until = time.monotonic() + timeout_s
    while True:
        start = time.monotonic()
        with contextlib.suppress(InferctlError):
            request()
        took = time.monotonic() - start
        if idle_s is None or took <= 2 * idle_s + 0.005 or time.monotonic() > until:
            return took
        time.sleep(0.05)
