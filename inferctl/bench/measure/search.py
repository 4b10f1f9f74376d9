"""Send the probes that `goodput.find` requests: the search for the highest rate at which a server meets the SLO."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from inferctl.bench import stats
from inferctl.bench.judge import goodput, summary
from inferctl.bench.judge import probe as probes
from inferctl.bench.judge.probe import Probe
from inferctl.bench.load import records
from inferctl.bench.measure.outcome import Measurement
from inferctl.bench.plan import workload
from inferctl.bench.plan.sections import Search
from inferctl.bench.plan.shape import Load
from inferctl.bench.plan.tokens import Tokenizer
from inferctl.core.errors import InferctlError

BURST_S, BURST_USERS, GENERATION_BURST_S = 4.0, 32, 15.0
# More samples than the interval of a p99 needs: the last responses of a probe may come late.
ENOUGH_SAMPLES = round(1.15 * stats.needed(0.99))
MIN_PROBE_S = 4.0
IDLE_TIMEOUT_S = 30.0
# Seconds to start the load generator, in addition to the warm-up. A probe takes PROBE_OVERRUN x `probe_s` on average:
# it needs more responses, or is measured again.
START_S, PROBE_OVERRUN = 3.0, 1.5
# Measurements of a search in addition to those that halve the gap between two rates; that gap, relative to the rates.
MEASUREMENTS, GAP = 22, 0.25
# The same for a search with a short budget.
SHORT_MEASUREMENTS, SHORT_GAP = len(goodput.SHORT_SWEEP) + goodput.RESERVE, 0.5

MeasureLoad = Callable[[workload.Workload, Path], Measurement]


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

        If no rate meets the SLO, the measurement is the one at the lowest rate with a response. Raises `InferctlError`
        if no probe has one.
        """
        start, budget = time.monotonic(), None
        if self.seconds is not None:
            self._deadline = start + self.seconds
            short = forecast(self.settings, self.load, self.seconds).short
            budget = goodput.Budget(self.seconds, self._remaining_s, self._cost_s, short)
        ceiling = None if self.settings.start_rate else self._ceiling()
        found = goodput.find(self.settings, self.slo_p99_ms, ceiling, self.measure, budget)
        if self.seconds is not None:
            found["budget"] = {"seconds": self.seconds, "spent_s": round(time.monotonic() - start, 1)}
        with_response = [(probe, measurement) for probe, measurement in self._measured if probe.n]
        if not with_response:
            raise InferctlError(
                f"no probe has a response: {found['reason']}",
                "set `search.start_rate` to a rate that the server can do",
            )
        rate = found["max_goodput_rps"] or min(probe.rate for probe, _ in with_response)
        # The last measurement of a rate is pooled with the earlier ones.
        chosen = next(measurement for probe, measurement in reversed(with_response) if probe.rate == rate)
        bounds = self.load.generation and self.load.generation.bounds
        # Other load next to any probe can have decided the result.
        noise = {
            key: max(run.resources.get(key, 0.0) for _, run in self._measured)
            for key in chosen.resources.keys() & {"other_cores", "stolen_cores"}
        }
        return replace(
            chosen,
            resources={**chosen.resources, **noise},
            search=found | ({"bounds_ms": bounds} if bounds else {}),
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
        found = self.measure_load(work, self._next_folder("ceiling")).summary
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
        place = self._next_folder(f"{stage}-{rate:g}")
        measurement = self.measure_load(workload.draw(load, self.corpus, seed, self.tokenizer), place)
        before = [run for probe, run in self._measured if probe in earlier]
        probe = self._judged(rate, stage, seed, [*before, measurement])
        self._measured.append((probe, replace(measurement, pooled=before)))
        self.on_probe(probe)
        return probe

    def _next_folder(self, name: str) -> Path:
        self._count += 1
        place = self.folder / f"{self._count:02d}-{name}"
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _judged(self, rate: float, stage: str, seed: int, runs: Sequence[Measurement]) -> Probe:
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
            probes.judge(found, self.slo_p99_ms, cpu, self.budget),
            client_cpu_percent=cpu,
            runs=len(runs),
            records=[
                file.relative_to(self.folder.parent.parent).as_posix()
                for run in runs
                for file in records.files(run.folder)
            ],
        )


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
