"""Search for the highest rate within an SLO: decide which rate to probe next. Sends no requests itself.

sweep      from a fifth of the ceiling upward, until the server is saturated, and one step beyond
bisect     between the highest rate within the SLO and the lowest one above it that is not, which is probed twice
confirm    the highest rate within the SLO again, with other arrival times: the best of many probes is biased
bound      the lowest rate that is shown to be too high again: it is the upper end of the band

With little time (`Budget.short`) the sweep measures each rate once, and every later probe counts as a confirmation: it
uses no earlier samples of its rate, and lasts as long as the budget and the width of its interval allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.bench import stats
from inferctl.bench.judge import search_outcome
from inferctl.bench.judge.probe import SATURATED, Probe
from inferctl.bench.plan.sections import Search

SWEEP = (0.2, 0.4, 0.6, 0.75, 0.9, 1.0, 1.15)
# With little time: fewer rates, and none beyond the first one that is too high.
SHORT_SWEEP = (0.3, 0.6, 0.9, 1.2)
# Measurements that a search with a budget reserves for the confirmation (at least one) and the upper end of the band.
RESERVE = 2
CONFIRMATIONS = 3
_STEP_BEYOND = 1.3
_BOUNDS = 2
_DESCENTS = 5
# The most measurements of one rate that are pooled, unless a short budget decides that.
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
) -> dict[str, Any]:
    """Probe rates with `measure(rate, stage, earlier probes of the rate to pool)`; return `search` of a receipt.

    `ceiling_rps` is the throughput of a closed loop that saturates the server; None starts at `settings.start_rate`. If
    the `budget` is used up, the result is what is known by then.
    """
    search = _RateSearch(settings, slo_p99_ms, measure, budget)
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

    def __init__(self, settings: Search, slo_p99_ms: float, measure: Measure, budget: Budget | None) -> None:
        self._settings, self._slo_p99_ms, self._measure, self._budget = settings, slo_p99_ms, measure, budget
        self._short = budget is not None and budget.short
        self._is_last = False
        self.expired = False
        self.log: list[Probe] = []
        self._latest: dict[float, Probe] = {}

    @property
    def _is_full(self) -> bool:
        return len(self.log) >= self._settings.max_probes

    @property
    def _is_spent(self) -> bool:
        return self._is_full or self._out_of_time(1 if self._short else RESERVE)

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
        """Probe a rate: measure it, and measure it again and pool while more samples are likely to decide."""
        rate = _rounded(min(rate, self._settings.max_rate))
        if self._short and stage == "bisect":
            stage = "confirm"
        pooled = [self._measure(rate, stage, [])]
        while self._is_worth_repeating(pooled[-1], stage):
            pooled = [*pooled, self._measure(rate, stage, pooled)]
        self.log.append(pooled[-1])
        self._latest[rate] = pooled[-1]
        return pooled[-1]

    def _is_worth_repeating(self, probe: Probe, stage: str) -> bool:
        if not (probe.insufficient or probe.interval_contains_slo) or (self._short and stage == "sweep"):
            return False
        if self._short:
            affordable = not self._out_of_time() if self._is_last else self._is_affordable(probe, probe.runs)
            return affordable and self._is_within(probe)
        # A confirmation may use the time that is reserved for it.
        reserve = 0 if stage in ("confirm", "bound") else RESERVE
        limit = _MAX_POOLED if probe.insufficient or self._is_within(probe) else 2
        return probe.runs < limit and not self._exceeds_budget(probe.rate, reserve)

    def _is_affordable(self, probe: Probe, runs: int = 0) -> bool:
        """Return whether the budget allows the measurements that are likely to show that the rate meets the SLO.

        The width of an interval falls with the square root of the samples. `runs` measurements count already.
        """
        needed = math.ceil(probe.runs * _missing_factor(probe, self._slo_p99_ms))
        return not self._exceeds_budget(probe.rate, max(0, needed - runs - 1))

    def sweep(self, ceiling_rps: float | None) -> None:
        """Probe upward until the server is saturated, and one step beyond, where throughput may fall."""
        start = self._settings.start_rate
        rates = [ceiling_rps * share for share in (SHORT_SWEEP if self._short else SWEEP)] if ceiling_rps else []
        if start is not None:
            rates = [start, *(rate for rate in rates if rate > start)]
        rate, beyond = 0.0, False
        while not self._is_spent:
            rate = rates.pop(0) if rates else rate * _STEP_BEYOND
            probe = self.probe(rate, "sweep")
            if beyond or probe.limited_by == "generator" or rate >= self._settings.max_rate:
                return
            if probe.limited_by in SATURATED:
                if self._short:
                    return
                beyond, rates = True, []

    def confirm(self) -> Probe | None:
        """Return a probe that confirms the best rate, or None.

        If a rate fails its confirmation, it is probed again, and that result counts. Then the next lower rate is found.
        """
        for _ in range(CONFIRMATIONS):
            if self._short:
                self._confirm_candidates()
            self._descend()
            self._bisect()
            low, _high = self.bracket()
            if low is None or self._confirm(low):
                break
        return self._highest_confirmed() or self._confirm_with_all_time()

    def _confirm(self, rate: float) -> bool:
        """Return whether the latest probe of `rate` confirms it; probe it up to twice for that."""
        for _ in range(2):
            latest = self._latest[rate]
            if (latest.stage == "confirm" and latest.meets_slo) or self._out_of_time():
                break
            self.probe(rate, "confirm")
        return bool(self._latest[rate].meets_slo)

    def _highest_confirmed(self) -> Probe | None:
        confirmed = [probe for probe in self._latest.values() if probe.stage == "confirm" and probe.meets_slo]
        return max(confirmed, key=lambda probe: probe.rate, default=None)

    def _confirm_with_all_time(self) -> Probe | None:
        """Spend the rest of a short budget on the rate that needs the fewest samples, since no rate was confirmed."""
        candidates = self._candidates()
        if not self._short or not candidates or self._out_of_time():
            return None
        self._is_last = True
        best = min(candidates, key=lambda probe: probe.runs * _missing_factor(probe, self._slo_p99_ms))
        probe = self.probe(best.rate, "confirm")
        return probe if probe.meets_slo else None

    def _candidates(self) -> list[Probe]:
        """Return probes, from the highest rate, whose p99 is within the SLO without having been shown to be."""
        too_high = min((rate for rate, probe in self._latest.items() if probe.above_limit), default=math.inf)
        return [
            probe
            for rate, probe in sorted(self._latest.items(), reverse=True)
            if rate < too_high and not probe.meets_slo and self._is_within(probe)
        ]

    def _is_within(self, probe: Probe) -> bool:
        """Return whether the p99 is within the SLO, as far as it is known: a small sample has none."""
        return probe.p99_ms is None or probe.p99_ms <= self._slo_p99_ms

    def _confirm_candidates(self) -> None:
        """Confirm the highest rate whose p99 was within the SLO in the sweep, if the budget allows it.

        Bisection takes a rate for too high if its interval contains the SLO. With one measurement of each rate it would
        go on to lower rates, where the samples are fewer still.
        """
        for candidate in self._candidates():
            confirmed = any(probe.meets_slo and rate > candidate.rate for rate, probe in self._latest.items())
            if confirmed:
                return
            if candidate.stage == "sweep" and self._is_affordable(candidate):
                self.probe(candidate.rate, "confirm")

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


def _missing_factor(probe: Probe, slo_p99_ms: float) -> float:
    """Return how many times the samples of `probe` are likely to show that its p99 is within the SLO."""
    factor = stats.needed(0.99) * (probe.variance_inflation or 1.0) / probe.n
    high = probe.p99_interval_ms[1]
    if probe.p99_ms is not None and high is not None and probe.p99_ms < slo_p99_ms:
        factor = max(factor, ((high - probe.p99_ms) / (slo_p99_ms - probe.p99_ms)) ** 2)
    return factor


def _rounded(rate: float) -> float:
    """Return three significant digits: a measurement cannot tell 84.1237 requests/s from 84.1."""
    return float(f"{rate:.3g}")
