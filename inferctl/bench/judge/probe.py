"""A probe of a search: one rate offered to the server, and whether the server meets the SLO at this rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from inferctl.bench.judge import slo
from inferctl.bench.judge.validity import ACHIEVED_LIMIT, CLIENT_CPU_LIMIT
from inferctl.receipts import shares
from inferctl.receipts.receipt import JsonObject

# Constraints that a higher rate violates too: the sweep can end.
SATURATED = ("fell behind", "errors", "generator")
_JSON_KEYS = {"meets_slo": "holds", "limited_by": "broke", "variance_inflation": "dependence"}
_NOT_IN_JSON = "interval_contains_slo"


@dataclass(frozen=True)
class RateVerdict:
    """Whether the server meets the SLO at a rate (None: not enough samples to say), and why.

    `limited_by` names the violated constraint: p99, errors, fell behind, generator, or "n too small".
    """

    meets_slo: bool | None
    limited_by: str | None
    reason: str
    interval_contains_slo: bool = False


@dataclass(frozen=True)
class Probe:
    """The figures of one rate, pooled over `runs` measurements. Rates are in requests/s, times in ms.

    Percentiles are None if there are not enough samples. `variance_inflation` is that of the p99 interval. `meets_slo`,
    `limited_by`, `reason` and `interval_contains_slo` are the `RateVerdict`.
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
    errors: Mapping[str, int]
    late: int
    client_cpu_percent: float | None
    meets_slo: bool | None
    limited_by: str | None
    reason: str
    runs: int = 1
    variance_inflation: float | None = None
    records: Sequence[str] = field(default_factory=list)
    interval_contains_slo: bool = False

    @property
    def above_limit(self) -> bool:
        """Return whether the rate is shown to be too high: not by an interval that contains the SLO."""
        if self.limited_by == "p99":
            return not self.interval_contains_slo
        return self.limited_by in ("fell behind", "errors")

    @property
    def insufficient(self) -> bool:
        """Return whether there are not enough samples: too few for a p99, or too autocorrelated to judge it."""
        return self.meets_slo is None

    def as_dict(self) -> dict[str, Any]:
        """Return the probe as it is in a receipt."""
        fields = asdict(self)
        return {_JSON_KEYS.get(name, name): value for name, value in fields.items() if name != _NOT_IN_JSON}


def judge(summary: JsonObject, slo_p99_ms: float, client_cpu_percent: float | None, budget: float) -> RateVerdict:
    """Return whether the server meets the SLO at the rate that `summary` describes: the bounds of generation, if there
    are any, else the limit of the p99.

    `budget` is the share of requests that may fail. If more fail, but not enough to show that the true share is over
    the budget, there are not enough samples.
    """
    errors = {name: count for name, count in summary["errors"].items() if name != "dropped"}
    offered, answered = summary["offered"] or 0, summary["answered"] or 0
    failed = sum(errors.values())
    if client_cpu_percent is not None and client_cpu_percent > CLIENT_CPU_LIMIT:
        return RateVerdict(False, "generator", f"the load generator used {client_cpu_percent:.0f}% of its core")
    if shares.exceeds(failed, summary["requests"], budget):
        kinds = ", ".join(f"{name}: {count}" for name, count in errors.items())
        return RateVerdict(False, "errors", f"{failed} of {summary['requests']} requests failed ({kinds})")
    # Failed requests are judged above, by the error budget.
    expected = offered - failed
    if answered < ACHIEVED_LIMIT * expected:
        return RateVerdict(False, "fell behind", f"{answered} of {expected} offered requests were completed in time")
    if dropped := summary["dropped"]:
        reason = f"{dropped} of {summary['requests']} requests were dropped, because too many were waiting"
        return RateVerdict(False, "fell behind", reason)
    if summary.get("goodput"):
        found = slo.judge_bounds({**summary, "requests": summary["requests"] - summary["dropped"]}, budget)
    else:
        found = slo.judge(summary["latency_ms"], slo_p99_ms, failed, budget)
    if found.interval_contains_limit:
        return RateVerdict(False, "p99", found.reason, interval_contains_slo=True)
    limited_by = {True: None, False: "p99", None: "n too small"}[found.met]
    return RateVerdict(found.met, limited_by, found.reason)


def make(
    stage: str,
    rate: float,
    seed: int,
    summary: JsonObject,
    verdict: RateVerdict,
    *,
    client_cpu_percent: float | None = None,
    runs: int = 1,
    records: Sequence[str] = (),
) -> Probe:
    """Return the probe whose runs, pooled, have this summary and this verdict.

    With bounds of generation, its percentiles are in percent of the bounds.
    """
    latency = (summary.get("goodput") or {}).get("bounds_percent") or summary["latency_ms"]
    p50, p99 = latency["p50"], latency["p99"]
    return Probe(
        stage=stage,
        rate=rate,
        seed=seed,
        seconds=summary["seconds"],
        offered=summary["offered"],
        answered=summary["answered"],
        achieved_rps=summary["requests_per_s"],
        n=latency["n"],
        p50_ms=p50["value"],
        p50_interval_ms=(p50["low"], p50["high"]),
        p99_ms=p99["value"],
        p99_interval_ms=(p99["low"], p99["high"]),
        errors=summary["errors"],
        late=summary["late"],
        client_cpu_percent=client_cpu_percent,
        runs=runs,
        variance_inflation=p99["dependence"],
        records=list(records),
        **asdict(verdict),
    )
