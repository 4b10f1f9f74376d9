"""Whether a run's numbers may be used. A reason makes a run invalid; a caution is said beside the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CLIENT_CPU_LIMIT = 90.0
ACHIEVED_LIMIT = 0.98
OTHERS_LIMIT = 0.10
STOLEN_LIMIT = 0.05
_TOO_SMALL_P90 = 36


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


def judge(summary: Mapping[str, Any], resources: Mapping[str, float], state: Mapping[str, Any], cores: int) -> Validity:
    """Judge one run by its summary, by what processes used meanwhile, and by the load generator's account of itself."""
    reasons, cautions = [], []
    client = resources.get("client_cpu_percent")
    if client is not None and client > CLIENT_CPU_LIMIT:
        reasons.append(
            f"the load generator used {client:.0f} % of its core (limit {CLIENT_CPU_LIMIT:.0f} %): it was the bottleneck"
        )
    requested, achieved = summary["requested_per_s"], summary["requests_per_s"]
    if requested and achieved < ACHIEVED_LIMIT * requested:
        reasons.append(
            f"answered {achieved:.1f} of {requested:.1f} requests/s offered ({100 * achieved / requested:.0f} %, limit 98 %)"
        )
    if summary["errors"]:
        kinds = ", ".join(f"{name}: {count}" for name, count in summary["errors"].items())
        reasons.append(f"{sum(summary['errors'].values())} of {summary['requests']} requests failed ({kinds})")
    if state.get("unfinished"):
        reasons.append(f"{state['unfinished']} requests were never answered")
    n, p99 = summary["latency_ms"]["n"], summary["latency_ms"]["p99"]
    if n < _TOO_SMALL_P90:
        reasons.append(f"n too small: {n} answers, {_TOO_SMALL_P90} needed for a p90")
    elif p99["value"] is None:
        cautions.append(f"n too small for a p99: {n} of {p99['needed']} answers")
    if not state.get("steady", True):
        cautions.append("the warm-up ended before three windows agreed within 10 %")
    if resources.get("other_cores", 0.0) > OTHERS_LIMIT * cores:
        cautions.append(f"other processes used more than {OTHERS_LIMIT:.0%} of the cores meanwhile")
    if resources.get("stolen_cores", 0.0) > STOLEN_LIMIT * cores:
        cautions.append(f"the hypervisor withheld more than {STOLEN_LIMIT:.0%} of the cores")
    return Validity(tuple(reasons), tuple(cautions))


def combine(parts: Sequence[Validity], pooled: Mapping[str, Any]) -> Validity:
    """Validity of several runs of one configuration, whose pooled summary is given: invalid when one of them is.

    Cautions about the number of samples are judged on the pool.
    """
    many = len(parts) > 1
    reasons = [f"run {number}: {one}" if many else one for number, part in enumerate(parts, 1) for one in part.reasons]
    cautions = list(dict.fromkeys(one for part in parts for one in part.cautions))
    if many:
        cautions = [one for one in cautions if not one.startswith("n too small")]
        p99 = pooled["latency_ms"]["p99"]
        if p99["value"] is None:
            cautions.append(f"n too small for a p99: {pooled['latency_ms']['n']} of {p99['needed']} answers")
    return Validity(tuple(reasons), tuple(cautions))
