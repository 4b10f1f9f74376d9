"""Whether a run's numbers may be used. A reason makes a run invalid; a caution is said beside the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.bench import stats
from inferctl.bench.judge.summary import failures

CLIENT_CPU_LIMIT = 90.0
ACHIEVED_LIMIT = 0.98
LATE_LIMIT = 0.01
OTHERS_LIMIT = 0.10
STOLEN_LIMIT = 0.05
_TOO_SMALL_P90 = 36
# What must stay as it is from run to run, and where `GET /info` says it.
_IDENTITY = {
    "the model's sha256": ("model", "sha256"),
    "effective precision": ("precision", "effective"),
    "attention": ("attention",),
    "image": ("image", "digest"),
    "device": ("device", "name"),
}


@dataclass(frozen=True)
class Validity:
    """`reasons` why the numbers are worthless (none: they are valid) and `cautions` to read them with."""

    reasons: tuple[str, ...]
    cautions: tuple[str, ...]

    @property
    def valid(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        return {"valid": self.valid, "reasons": list(self.reasons), "cautions": list(self.cautions)}


def judge(
    summary: Mapping[str, Any],
    resources: Mapping[str, float],
    state: Mapping[str, Any],
    cores: int,
    searched: bool = False,
) -> Validity:
    """Judge one run by its summary, by what processes used meanwhile, and by the load generator's account of itself.

    Whether there are answers enough is for `samples` to say, of all runs together. In a search (`searched`) what the server could not do at a rate
    is the answer: it is a caution, and the search's verdict says what follows.
    """
    reasons: list[str] = []
    cautions: list[str] = []
    servers = cautions if searched else reasons
    client = resources.get("client_cpu_percent")
    if client is not None and client > CLIENT_CPU_LIMIT:
        reasons.append(
            f"the load generator used {client:.0f} % of its core (limit {CLIENT_CPU_LIMIT:.0f} %): it was the bottleneck"
        )
    offered, answered = summary["offered"], summary["answered"]
    sent = summary["requests"] - summary["dropped"]
    late = bool(offered) and summary["late"] > LATE_LIMIT * sent
    # A rejection is an answer in time.
    expected = (offered or 0) - summary.get("rejected", 0)
    if offered and answered < ACHIEVED_LIMIT * expected:
        (reasons if late else servers).append(
            f"{answered} of {expected} requests offered were answered in time "
            f"({100 * answered / expected:.0f} %, limit {100 * ACHIEVED_LIMIT:.0f} %): "
            + ("the load generator was late itself" if late else "the server fell behind")
        )
    if dropped := summary["dropped"]:
        servers.append(f"{dropped} of {summary['requests']} requests were dropped: too many were unanswered")
    if summary.get("rejected"):
        cautions.append(_rejected(summary))
    if state.get("unfinished"):
        servers.append(f"{state['unfinished']} requests were never answered")
    if late:
        cautions.append(
            f"{summary['late']} of {sent} requests left over 1 ms late ({100 * summary['late'] / sent:.1f} %): "
            "the load generator was short of time, and latencies contain that"
        )
    peak = state.get("cpu_peak_percent") or 0.0
    if peak > CLIENT_CPU_LIMIT and (client or 0.0) <= CLIENT_CPU_LIMIT:
        cautions.append(
            f"the load generator used {peak:.0f} % of its core in its busiest second: latencies then contain its own"
        )
    if not state.get("steady", True):
        cautions.append("the warm-up ended before three windows agreed within 10 %")
    if resources.get("other_cores", 0.0) > OTHERS_LIMIT * cores:
        cautions.append(f"other processes used more than {OTHERS_LIMIT:.0%} of the cores meanwhile")
    if resources.get("stolen_cores", 0.0) > STOLEN_LIMIT * cores:
        cautions.append(f"the hypervisor withheld more than {STOLEN_LIMIT:.0%} of the cores")
    return Validity(tuple(reasons), tuple(cautions))


def failed(summary: Mapping[str, Any], budget_percent: float, searched: bool = False) -> Validity:
    """Judge the failed requests of all runs of a configuration against the error budget."""
    kinds = failures(summary)
    if not kinds:
        return Validity((), ())
    count = sum(kinds.values())
    said = (
        f"{count} of {summary['requests']} requests failed "
        f"({', '.join(f'{name}: {each}' for name, each in kinds.items())})"
    )
    share = 100 * count / summary["requests"]
    if share <= budget_percent or searched:
        return Validity((), (said,))
    return Validity((f"{said}: {share:.2g} %, the error budget is {budget_percent:g} %",), ())


def _rejected(summary: Mapping[str, Any]) -> str:
    return (
        f"the server rejected {summary['rejected']} of {summary['requests']} requests (429, "
        f"{summary['rejected_percent']:.2g} %): latencies are those of accepted requests"
    )


def samples(summary: Mapping[str, Any]) -> Validity:
    """Whether a configuration has answers enough, by the summary of all its runs."""
    n, p99 = summary["latency_ms"]["n"], summary["latency_ms"]["p99"]
    if n < _TOO_SMALL_P90:
        return Validity((f"n too small: {n} answers, {_TOO_SMALL_P90} needed for a p90",), ())
    if p99["value"] is None:
        return Validity((), (f"n too small for a p99: {n} of {p99['needed']} answers",))
    if (worth := stats.effective(n, p99.get("dependence"))) < p99["needed"]:
        said = f"effective sample size {worth} ({n} responses, autocorrelated), the p99 needs {p99['needed']}"
        return Validity((), (f"{said}: its interval is bounded by the largest sample, the true p99 may lie above",))
    return Validity((), ())


def same(infos: Sequence[Mapping[str, Any]]) -> Validity:
    """Whether runs of one configuration measured the same thing, by what the server said of itself (`GET /info`) at each of them."""
    told = {name: list(dict.fromkeys(str(_within(info, path)) for info in infos)) for name, path in _IDENTITY.items()}
    return Validity(
        tuple(f"the runs differ in {name}: {', '.join(values)}" for name, values in told.items() if len(values) > 1),
        (),
    )


def both(one: Validity, other: Validity) -> Validity:
    """What two judges say of one run."""
    return Validity((*one.reasons, *other.reasons), (*one.cautions, *other.cautions))


def combine(
    parts: Sequence[Validity], pooled: Mapping[str, Any], budget_percent: float = 0.1, searched: bool = False
) -> Validity:
    """Return the validity of the runs of one configuration, whose pooled summary is given.

    It is invalid if one run is, if all together are too few samples, or if more than the error budget failed.
    """
    many = len(parts) > 1
    reasons = [f"run {number}: {one}" if many else one for number, part in enumerate(parts, 1) for one in part.reasons]
    cautions = [one for part in parts for one in part.cautions]
    whole = both(samples(pooled), failed(pooled, budget_percent, searched))
    if many and pooled.get("rejected"):
        # Once for all runs instead of once per run.
        each = "the server rejected "
        cautions = [*(one for one in cautions if not one.startswith(each)), _rejected(pooled)]
    return Validity((*reasons, *whole.reasons), tuple(dict.fromkeys((*cautions, *whole.cautions))))


def _within(info: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = info
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
