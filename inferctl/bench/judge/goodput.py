"""The highest rate that holds an SLO, out of probes at chosen rates: which rate to try next, and what the probes say together. Sends nothing.

    sweep      from a fifth of the ceiling upward, until the server falls behind or fails, and one step beyond
    bisect     between the highest rate that holds and the lowest above it that does not, which is probed twice while probes are left
    confirm    the highest that holds, once more with other times: the one that was picked as the best of many had luck
    bound      the lowest that is shown not to hold, once more: it ends the band of the result

Words, as R. Jain and D.-M. Chiu use them (Computer Networks 17, 1989): up to the *knee* more load costs little latency, beyond it latency bends
while throughput still grows; at the *cliff* throughput falls, or errors start. Between them throughput may just stop growing: *saturation*.
The knee is where throughput / latency, Kleinrock's power, is greatest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from inferctl.bench import stats
from inferctl.bench.judge import slo
from inferctl.bench.judge.validity import ACHIEVED_LIMIT, CLIENT_CPU_LIMIT
from inferctl.bench.plan.plan import Search
from inferctl.errors import NotEnoughEvidenceError

SWEEP = (0.2, 0.4, 0.6, 0.75, 0.9, 1.0, 1.15)
# With little time: fewer rates, and none beyond the first that is too much.
SHORT_SWEEP = (0.3, 0.6, 0.9, 1.2)
# Measurements that a search with a budget keeps for the confirmation and the end of its band.
RESERVE = 2
BEYOND = 1.3
FALLS = 0.95
CONFIRMATIONS = 3
BOUNDS = 2
# How often a rate whose answers are too few, or too much alike, is measured and pooled before the probe stands as it is.
LOOKS = 4
# Constraints that more load cannot mend: the sweep need not go on.
_SATURATED = ("fell behind", "errors", "generator")


@dataclass(frozen=True)
class Probe:
    """One rate offered to the server for a while (`runs` times, pooled). Rates in requests/s, times in ms; None is "n too small".

    `holds` is None when the sample is too small to say; `broke` names the constraint otherwise: p99, errors, fell behind, generator.
    `dependence` is that of the p99's interval (`stats.dependence`).
    `ended_early`: the backlog grew without doubt, so the rest was not waited for, and its latencies are lower bounds.
    """

    stage: str
    rate: float
    seed: int
    seconds: float
    offered: int
    answered: int
    achieved_rps: float
    n: int
    p50_ms: float | None
    p50_interval_ms: tuple[float | None, float | None]
    p99_ms: float | None
    p99_interval_ms: tuple[float | None, float | None]
    errors: dict[str, int]
    late: int
    client_cpu_percent: float | None
    holds: bool | None
    broke: str | None
    reason: str
    ended_early: bool = False
    runs: int = 1
    dependence: float | None = None
    records: list[str] = field(default_factory=list)

    @property
    def undecided(self) -> bool:
        """Whether more of the same could turn the verdict: the interval of the p99 contains the SLO."""
        return self.broke == "p99" and self.reason.endswith("contains it")

    @property
    def exceeds(self) -> bool:
        """Return whether the rate is shown to be too much for the server: not by an interval that contains the SLO."""
        return self.broke in ("fell behind", "errors") or (self.broke == "p99" and not self.undecided)

    @property
    def short(self) -> bool:
        """Return whether samples are lacking: too few for a p99, or too autocorrelated to judge it."""
        return self.holds is None


Measure = Callable[[float, str, Sequence[Probe]], Probe]


@dataclass(frozen=True)
class Budget:
    """The time of a search: `left` seconds, `cost` of a measurement at a rate in seconds; `short` for a short sweep."""

    seconds: float
    left: Callable[[], float]
    cost: Callable[[float], float]
    short: bool = False


def judge(
    summary: Mapping[str, Any],
    slo_p99_ms: float,
    client_cpu: float | None,
    growing: str | None = None,
    budget: float = 0.0,
) -> tuple[bool | None, str | None, str]:
    """Return (holds, broke, reason) of one rate by its summary.

    `growing` says how the backlog grew when the probe was ended for that; `budget` is the share of requests that may
    fail.
    """
    errors = {name: count for name, count in summary["errors"].items() if name != "dropped"}
    offered, answered = summary["offered"] or 0, summary["answered"] or 0
    failed = sum(errors.values())
    if client_cpu is not None and client_cpu > CLIENT_CPU_LIMIT:
        return False, "generator", f"the load generator used {client_cpu:.0f} % of its core"
    if failed > budget * summary["requests"]:
        return False, "errors", f"{failed} of {summary['requests']} requests failed ({_listed(errors)})"
    if growing:
        return False, "fell behind", growing
    if answered < ACHIEVED_LIMIT * offered:
        return False, "fell behind", f"{answered} of {offered} requests offered were answered in time"
    if dropped := summary["dropped"]:
        return False, "fell behind", f"{dropped} of {summary['requests']} requests were dropped, so many were waiting"
    holds, reason = slo.judge(summary["latency_ms"], slo_p99_ms, failed / max(1, summary["requests"]), budget)
    if holds is None and reason.endswith("contains it"):
        return False, "p99", reason
    return holds, None if holds else "n too small" if holds is None else "p99", reason


def find(
    settings: Search, slo_p99_ms: float, ceiling: float | None, measure: Measure, budget: Budget | None = None
) -> dict[str, Any]:
    """Probe by way of `measure(rate, stage, earlier probes of that rate to pool with)`; returns the receipt's `search` key.

    `ceiling`: requests/s of a closed loop that keeps the server busy; None starts at `settings.start_rate`. When the
    `budget` is used up, the result is what is known by then.
    """
    hunt = _Hunt(settings, measure, budget)
    hunt.sweep(ceiling)
    best = hunt.settle()
    if best:
        hunt.bound(best)
    return _result(settings, slo_p99_ms, ceiling, hunt, best)


class _Hunt:
    def __init__(self, settings: Search, measure: Measure, budget: Budget | None = None) -> None:
        self._settings, self._measure, self._budget = settings, measure, budget
        self.expired = False
        self.log: list[Probe] = []
        self.latest: dict[float, Probe] = {}

    @property
    def spent(self) -> bool:
        return len(self.log) >= self._settings.max_probes or self.out_of_time(RESERVE)

    def out_of_time(self, reserve: int = 0) -> bool:
        """Return whether the budget has no room for a measurement and `reserve` further ones."""
        if self._budget is None or not self.log:
            return False
        out = self._budget.left() < (1 + reserve) * self._budget.cost(self.log[-1].rate)
        self.expired |= out
        return out

    def probe(self, rate: float, stage: str) -> Probe:
        """Probe a rate; again, pooled, while answers are lacking, and once more when its interval leaves the verdict open."""
        rate = _tidy(min(rate, self._settings.max_rate))
        earlier: list[Probe] = []
        made = self._measure(rate, stage, earlier)
        while ((made.short and len(earlier) < LOOKS - 1) or (made.undecided and not earlier)) and not self._late(made):
            earlier = [*earlier, made]
            made = self._measure(rate, stage, earlier)
        self.log.append(made)
        self.latest[rate] = made
        return made

    def _late(self, made: Probe) -> bool:
        """Return whether the budget has no room to measure `made` again; a confirmation may use what is kept for it."""
        if self._budget is None:
            return False
        reserve = 0 if made.stage in ("confirm", "bound") else RESERVE
        late = self._budget.left() < (1 + reserve) * self._budget.cost(made.rate)
        self.expired |= late
        return late

    def sweep(self, ceiling: float | None) -> None:
        """Upward until the server is saturated, and one step beyond, where throughput may fall."""
        start = self._settings.start_rate
        short = self._budget is not None and self._budget.short
        ladder = [ceiling * share for share in (SHORT_SWEEP if short else SWEEP)] if ceiling else []
        if start is not None:
            ladder = [start, *(rate for rate in ladder if rate > start)]
        rate, beyond = 0.0, False
        while not self.spent:
            rate = ladder.pop(0) if ladder else rate * BEYOND
            made = self.probe(rate, "sweep")
            if beyond or made.broke == "generator" or rate >= self._settings.max_rate:
                return
            if made.broke in _SATURATED:
                if short:
                    return
                beyond, ladder = True, []

    def descend(self) -> None:
        """Downward when even the first rate does not hold."""
        for _ in range(5):
            low, high = self.bracket()
            full = len(self.log) >= self._settings.max_probes
            if low is not None or high is None or full or self.out_of_time(1):
                return
            if self.probe(high / 2, "bisect").holds is None:
                return

    def bracket(self) -> tuple[float | None, float | None]:
        """The highest rate that holds and the lowest above it that does not, where the fewest probes say otherwise (of equals: the lower one).

        A single failure below rates that hold was the machine's; a single success above rates that fail was luck.
        """
        known = [(rate, bool(probe.holds)) for rate, probe in sorted(self.latest.items()) if probe.holds is not None]
        borders = [0.0, *(rate for rate, holds in known if holds)]
        low = min(borders, key=lambda border: sum(holds != (rate <= border) for rate, holds in known))
        high = min((rate for rate, holds in known if not holds and rate > low), default=None)
        return low or None, high

    def bisect(self) -> None:
        """Until the failing rate is close above the holding one, and has failed twice, or the probes are spent."""
        while not self.spent:
            low, high = self.bracket()
            if low is None or high is None:
                return
            above = [rate for rate, probe in self.latest.items() if probe.holds and rate > high]
            near = high <= low * (1 + self._settings.resolution)
            if (above or near) and sum(probe.rate == high and probe.holds is False for probe in self.log) < 2:
                # One bad moment of the machine must not become the server's limit. Once more, and the new result counts.
                self.probe(high, "bisect")
            elif near or self.probe((low + high) / 2, "bisect").holds is None:
                return

    def settle(self) -> Probe | None:
        """The best rate's own, fresh probe. One that held and now fails is probed a third time, which decides; then the next lower is found."""
        for _ in range(CONFIRMATIONS):
            self.descend()
            self.bisect()
            low, _high = self.bracket()
            if low is None:
                return None
            for _ in range(2):
                if self.out_of_time():
                    return None
                made = self.probe(low, "confirm")
                if made.holds:
                    return made
        return None

    def bound(self, best: Probe) -> None:
        """Probe the lowest rate that was shown not to meet the SLO once more, else the next one."""
        tried: set[float] = set()
        for _ in range(BOUNDS):
            band = _band(self.log, best)
            once = {probe.rate for probe in self.log if probe.exceeds and probe.rate > best.rate} - tried
            lowest = min(once, default=None)
            full = len(self.log) >= self._settings.max_probes
            if full or band is None or lowest is None or band[1] == lowest or self.out_of_time():
                return
            tried.add(lowest)
            self.probe(lowest, "bound")


def _result(
    settings: Search, slo_p99_ms: float, ceiling: float | None, hunt: _Hunt, best: Probe | None
) -> dict[str, Any]:
    probes = sorted(hunt.latest.values(), key=lambda probe: probe.rate)
    failing = [probe for probe in probes if probe.holds is False and (best is None or probe.rate > best.rate)]
    first = failing[0] if failing else None
    if best:
        verdict = "found" if first and first.broke != "generator" else "at least"
    else:
        held = any(probe.holds for probe in hunt.log)
        # A rate under which the server broke down says nothing of lower ones that nobody could judge.
        judged = failing and (failing[0].broke == "p99" or all(probe.holds is not None for probe in probes))
        # With more time a lower rate could have been tried, unless the lowest one is shown to be too much.
        unfinished = hunt.expired and not (probes and probes[0].exceeds)
        verdict = "not confirmed" if held or unfinished else "none holds" if judged else "n too small"
    return {
        "slo_p99_ms": slo_p99_ms,
        "resolution": settings.resolution,
        "ceiling_rps": ceiling and round(ceiling, 3),
        "verdict": verdict,
        "max_goodput_rps": best.rate if best else None,
        "first_failing_rps": first.rate if first else None,
        "first_failing_times": sum(p.rate == first.rate and p.holds is False for p in hunt.log) if first else None,
        "limited_by": first.broke if first else None,
        "reason": first.reason if first else "",
        "band_rps": _band(hunt.log, best) if best or not hunt.expired else _unconfirmed(hunt),
        "expired": hunt.expired,
        "caution": None,
        "failed_below": [probe.rate for probe in probes if best and probe.holds is False and probe.rate < best.rate],
        **shape(probes),
        "probes": [asdict(probe) for probe in hunt.log],
    }


def _band(log: Sequence[Probe], best: Probe | None) -> list[float | None] | None:
    """Return the rates between which the highest rate within the SLO lies, or None if no rate was confirmed.

    Below: the confirmed rate, whose p99 is shown to be within the SLO. Above: the lowest rate at which a second probe
    shows that the SLO is not met, there or at a lower rate; None if there is none. The lowest of several single probes
    would be the one with the worst luck.
    """
    if best is None:
        return None
    shown = sorted(probe.rate for probe in log if probe.exceeds and probe.rate > best.rate)
    return [best.rate, shown[1] if len(shown) > 1 else None]


def _unconfirmed(hunt: _Hunt) -> list[float | None] | None:
    """Return the band when no time was left to confirm: from the highest rate that met the SLO once."""
    low, _ = hunt.bracket()
    shown = sorted(probe.rate for probe in hunt.log if probe.exceeds and probe.rate > (low or 0))
    high = shown[1] if len(shown) > 1 else shown[0] if shown else None
    return [low or 0.0, high] if low or high else None


def shape(probes: Sequence[Probe]) -> dict[str, Any]:
    """Knee, saturation and cliff of probes in the order of their rates; each None where it was not seen."""
    kept = [p for p in probes if p.broke not in _SATURATED and p.p50_ms and p.achieved_rps]
    knee = max(kept, key=lambda p: p.achieved_rps / (p.p50_ms or 1), default=None)
    if knee and (len(kept) < 3 or knee is kept[-1]):
        knee = None
    behind = _from_here_on(probes, lambda probe: probe.broke in ("fell behind", "errors"), "fell behind")
    most = [max((p.achieved_rps for p in probes[: index + 1]), default=0.0) for index in range(len(probes))]
    erring = _from_here_on(probes, lambda probe: probe.broke in _SATURATED, "errors")
    low = {p.rate for p, before in zip(probes[1:], most, strict=False) if p.achieved_rps < FALLS * before}
    falling = _from_here_on(probes, lambda probe: probe.rate in low, "fell behind")
    cliff = None
    if falling and (not erring or falling.rate < erring.rate):
        before = max(p.achieved_rps for p in probes if p.rate < falling.rate)
        reason = f"{falling.achieved_rps:.1f} requests/s, after {before:.1f} at a lower rate"
        cliff = {"rps": falling.rate, "kind": "throughput falls", "reason": reason}
    elif erring:
        cliff = {"rps": erring.rate, "kind": "errors", "reason": erring.reason}
    return {
        "knee_rps": knee.rate if knee else None,
        "saturation_rps": behind.rate if behind else None,
        "saturated_at_rps": round(max((p.achieved_rps for p in probes), default=0.0), 3) if behind else None,
        "cliff": cliff,
    }


def _from_here_on(probes: Sequence[Probe], bad: Callable[[Probe], bool], broke: str) -> Probe | None:
    """The lowest probe that broke so, of those from which on all are bad: one bad probe below good ones was the machine's."""
    start = len(probes)
    while start and bad(probes[start - 1]):
        start -= 1
    return next((probe for probe in probes[start:] if probe.broke == broke), None)


def sentences(name: str, search: Mapping[str, Any]) -> list[str]:
    """What a search found, in words; the first one is the finding."""
    slo, best = search["slo_p99_ms"], search["max_goodput_rps"]
    last = next((p for p in reversed(search["probes"]) if p["rate"] == best and p["holds"]), None)
    if best and last:
        low, high = last["p99_interval_ms"]
        more = "at least " if search["verdict"] == "at least" else ""
        ends = ", which ends with the sample: the true one may lie above" if search.get("caution") else ""
        found = [
            f"{name} meets the SLO (p99 {slo:g} ms) up to {more}{best:g} requests/s{_within(search)}; "
            f"p99 there {last['p99_ms']:.1f} ms, interval {low:.1f} - {high:.1f}{ends}."
        ]
    elif search["verdict"] == "n too small":
        found = [
            f"{name}: inconclusive, not enough samples to say which rate meets the SLO (p99 {slo:g} ms); "
            "give the probes more time (max_probe_s)."
        ]
    elif search.get("expired") and search["verdict"] == "not confirmed":
        found = [
            f"{name}: inconclusive, the budget left no time to confirm a rate that meets the SLO "
            f"(p99 {slo:g} ms){_within(search)}."
        ]
    elif search["verdict"] == "not confirmed":
        found = [
            f"{name}: inconclusive, no rate that met the SLO (p99 {slo:g} ms) met it again; "
            "the machine is too unsteady."
        ]
    else:
        small = max((p["rate"] for p in search["probes"] if p["holds"] is None), default=None)
        unsaid = f"; {small:g} requests/s is inconclusive (not enough samples)" if small else ""
        found = [f"{name} meets the SLO (p99 {slo:g} ms) at no rate that was tried{unsaid}."]
    if search["first_failing_rps"]:
        once = " (one probe only)" if search.get("first_failing_times") == 1 else ""
        found.append(
            f"{name} first fails at {search['first_failing_rps']:g} requests/s{once} by {search['limited_by']}: {search['reason']}."
        )
    if search.get("failed_below"):
        rates = ", ".join(f"{rate:g}" for rate in search["failed_below"])
        found.append(f"{name} failed at {rates} requests/s too, below rates that held: the machine was unsteady.")
    if search.get("expired") and (budget := search.get("budget")):
        found.append(
            f"{name}: the search ended with its budget ({budget['seconds']:.0f} s, of which it took "
            f"{budget['spent_s']:.0f} s); a longer one narrows the band."
        )
    return [*found, *_bends(name, search)]


def _within(search: Mapping[str, Any]) -> str:
    """Return the band of the rate in words; older receipts have none."""
    if not (band := search.get("band_rps")):
        return ""
    low, high = band
    return f" (the limit lies between {low:g} and {high:g})" if high else f" (the limit is {low:g} or more)"


def unsettled(rows: Sequence[Mapping[str, Any]]) -> NotEnoughEvidenceError | None:
    """The error that a bench ends with when none of its searches came to an answer; `rows` are those of its result."""
    searched = [row for row in rows if row.get("search")]
    if not searched or any(row["search"]["verdict"] not in ("n too small", "not confirmed") for row in searched):
        return None
    reasons = "; ".join(sentences(row["configuration"], row["search"])[0].rstrip(".") for row in searched)
    return NotEnoughEvidenceError(
        reasons, "give the probes more time: `search: {probe_s: 20, max_probe_s: 120}` in a plan"
    )


def _bends(name: str, search: Mapping[str, Any]) -> list[str]:
    parts = []
    if search["knee_rps"]:
        parts.append(f"knee at {search['knee_rps']:g} requests/s (beyond it latency grows faster than throughput)")
    if search["saturation_rps"]:
        parts.append(
            f"behind from {search['saturation_rps']:g} offered (it does {search['saturated_at_rps']:.1f} at most)"
        )
    cliff = search["cliff"]
    parts.append(f"cliff at {cliff['rps']:g}: {cliff['kind']}, {cliff['reason']}" if cliff else "no cliff seen")
    return [f"{name}: {'; '.join(parts)}."]


def slope(times: Sequence[float], values: Sequence[float]) -> tuple[float, float] | None:
    """Least-squares slope of `values` over `times` and the half-width of its 95 % interval; None for fewer than four points."""
    n = len(times)
    if n < 4:
        return None
    mean_t, mean_v = sum(times) / n, sum(values) / n
    spread = sum((t - mean_t) ** 2 for t in times)
    if not spread:
        return None
    rise = sum((t - mean_t) * (v - mean_v) for t, v in zip(times, values, strict=True)) / spread
    left = sum((v - mean_v - rise * (t - mean_t)) ** 2 for t, v in zip(times, values, strict=True))
    return rise, stats.student_t(n - 2) * (left / (n - 2) / spread) ** 0.5


def _tidy(rate: float) -> float:
    """Three digits: nobody can tell 84.1237 requests/s from 84.1."""
    return float(f"{rate:.3g}")


def _listed(errors: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in errors.items())
