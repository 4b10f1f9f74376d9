"""Search for the highest rate within an SLO: decide which rate to probe next. Sends no requests itself.

sweep      from a fifth of the ceiling upward, until the server is saturated, and one step beyond
bisect     between the highest rate within the SLO and the lowest one above it that is not, which is probed twice
confirm    the highest rate within the SLO again, with other arrival times: the best of many probes is biased
bound      the lowest rate that is shown to be too high again: it is the upper end of the band
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from inferctl.bench.judge import search_outcome
from inferctl.bench.judge.probe import SATURATED, Probe
from inferctl.bench.judge.search_outcome import SearchOutcome
from inferctl.bench.plan.plan import Search

SWEEP = (0.2, 0.4, 0.6, 0.75, 0.9, 1.0, 1.15)
# With little time: fewer rates, and none beyond the first one that is too high.
SHORT_SWEEP = (0.3, 0.6, 0.9, 1.2)
# Measurements that a search with a budget reserves for the confirmation and the upper end of the band.
RESERVE = 2
CONFIRMATIONS = 3
_STEP_BEYOND = 1.3
_BOUNDS = 2
_DESCENTS = 5
# The most measurements of one rate that are pooled to get enough samples.
_MAX_POOLED = 4

Measure = Callable[[float, str, Sequence[Probe]], Probe]


@dataclass(frozen=True)
class Budget:
    """The time of a search: `left` returns seconds, `cost` the seconds of a measurement at a rate.

    `short` selects the short sweep.
    """

    seconds: float
    left: Callable[[], float]
    cost: Callable[[float], float]
    short: bool = False


def find(
    settings: Search, slo_p99_ms: float, ceiling_rps: float | None, measure: Measure, budget: Budget | None = None
) -> SearchOutcome:
    """Probe rates with `measure(rate, stage, earlier probes of the rate to pool)` and return the outcome.

    `ceiling_rps` is the throughput of a closed loop that saturates the server; None starts at `settings.start_rate`. If
    the `budget` is used up, the outcome is what is known by then.
    """
    search = _RateSearch(settings, measure, budget)
    search.sweep(ceiling_rps)
    best = search.confirm()
    if best:
        search.bound(best)
    return search_outcome.summarize(
        search.log,
        best,
        slo_p99_ms=slo_p99_ms,
        resolution=settings.resolution,
        ceiling_rps=ceiling_rps,
        expired=search.expired,
        low=search.bracket()[0],
    )


class _RateSearch:
    """The probes so far: all of them in `log`, and the latest of each rate."""

    def __init__(self, settings: Search, measure: Measure, budget: Budget | None = None) -> None:
        self._settings, self._measure, self._budget = settings, measure, budget
        self.expired = False
        self.log: list[Probe] = []
        self._latest: dict[float, Probe] = {}

    @property
    def _is_full(self) -> bool:
        return len(self.log) >= self._settings.max_probes

    @property
    def _is_spent(self) -> bool:
        return self._is_full or self._out_of_time(RESERVE)

    def _out_of_time(self, reserve: int = 0) -> bool:
        """Return whether the remaining time is less than one measurement and `reserve` further ones take."""
        return bool(self.log) and self._exceeds_budget(self.log[-1].rate, reserve)

    def _exceeds_budget(self, rate: float, reserve: int) -> bool:
        if self._budget is None:
            return False
        exceeds = self._budget.left() < (1 + reserve) * self._budget.cost(rate)
        self.expired |= exceeds
        return exceeds

    def probe(self, rate: float, stage: str) -> Probe:
        """Probe a rate.

        The measurement is repeated and pooled while samples are missing, and once if its interval contains the SLO.
        """
        rate = _rounded(min(rate, self._settings.max_rate))
        # A confirmation may use the time that is reserved for it.
        reserve = 0 if stage in ("confirm", "bound") else RESERVE
        earlier: list[Probe] = []
        probe = self._measure(rate, stage, earlier)
        while (
            (probe.insufficient and len(earlier) < _MAX_POOLED - 1) or (probe.interval_contains_slo and not earlier)
        ) and not self._exceeds_budget(rate, reserve):
            earlier = [*earlier, probe]
            probe = self._measure(rate, stage, earlier)
        self.log.append(probe)
        self._latest[rate] = probe
        return probe

    def sweep(self, ceiling_rps: float | None) -> None:
        """Probe upward until the server is saturated, and one step beyond, where throughput may fall."""
        start = self._settings.start_rate
        short = self._budget is not None and self._budget.short
        rates = [ceiling_rps * share for share in (SHORT_SWEEP if short else SWEEP)] if ceiling_rps else []
        if start is not None:
            rates = [start, *(rate for rate in rates if rate > start)]
        rate, beyond = 0.0, False
        while not self._is_spent:
            rate = rates.pop(0) if rates else rate * _STEP_BEYOND
            probe = self.probe(rate, "sweep")
            if beyond or probe.limited_by == "generator" or rate >= self._settings.max_rate:
                return
            if probe.limited_by in SATURATED:
                if short:
                    return
                beyond, rates = True, []

    def confirm(self) -> Probe | None:
        """Return a probe that confirms the best rate, or None.

        If a rate fails its confirmation, it is probed again, and that result counts. Then the next lower rate is found.
        """
        for _ in range(CONFIRMATIONS):
            self._descend()
            self._bisect()
            low, _high = self.bracket()
            if low is None:
                return None
            for _ in range(2):
                if self._out_of_time():
                    return None
                probe = self.probe(low, "confirm")
                if probe.meets_slo:
                    return probe
        return None

    def bound(self, best: Probe) -> None:
        """Probe the lowest rate that was shown to be too high again; if it is not shown again, the next one."""
        probed: set[float] = set()
        for _ in range(_BOUNDS):
            band = search_outcome.band(self.log, best)
            above = {probe.rate for probe in self.log if probe.above_limit and probe.rate > best.rate} - probed
            lowest = min(above, default=None)
            if self._is_full or band is None or lowest is None or band[1] == lowest or self._out_of_time():
                return
            probed.add(lowest)
            self.probe(lowest, "bound")

    def bracket(self) -> tuple[float | None, float | None]:
        """Return the highest rate within the SLO and the lowest one above it that is not.

        The border between them is where the fewest probes contradict it; of equals, the lower one. A single failure
        below rates within the SLO is due to the machine, and a single success above failing rates to chance.
        """
        known = [
            (rate, bool(probe.meets_slo)) for rate, probe in sorted(self._latest.items()) if probe.meets_slo is not None
        ]
        borders = [0.0, *(rate for rate, meets_slo in known if meets_slo)]
        low = min(borders, key=lambda border: sum(meets_slo != (rate <= border) for rate, meets_slo in known))
        high = min((rate for rate, meets_slo in known if not meets_slo and rate > low), default=None)
        return low or None, high

    def _descend(self) -> None:
        """Probe downward if even the lowest rate so far does not meet the SLO."""
        for _ in range(_DESCENTS):
            low, high = self.bracket()
            if low is not None or high is None or self._is_full or self._out_of_time(1):
                return
            if self.probe(high / 2, "bisect").insufficient:
                return

    def _bisect(self) -> None:
        """Probe until the failing rate is close above the best one and has failed twice, or the probes are used up."""
        while not self._is_spent:
            low, high = self.bracket()
            if low is None or high is None:
                return
            contradicted = any(probe.meets_slo and rate > high for rate, probe in self._latest.items())
            close = high <= low * (1 + self._settings.resolution)
            failures = sum(probe.rate == high and probe.meets_slo is False for probe in self.log)
            if (contradicted or close) and failures < 2:
                # A single stall of the machine must not become the limit of the server: the new result counts.
                self.probe(high, "bisect")
            elif close or self.probe((low + high) / 2, "bisect").insufficient:
                return


def _rounded(rate: float) -> float:
    """Return three significant digits: a measurement cannot tell 84.1237 requests/s from 84.1."""
    return float(f"{rate:.3g}")
