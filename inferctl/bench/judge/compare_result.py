"""The result of `inferctl compare`: one outcome, the configurations, and the verdict on each of their metrics.

docs/compare.md describes the JSON document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from inferctl.bench.judge import verdict
from inferctl.bench.judge.verdict import Outcome
from inferctl.core.errors import InferctlError, InvalidRunError, NotEnoughEvidenceError
from inferctl.receipts.receipt import JsonObject, Receipt

SCHEMA = "inferctl.compare/1"
PairOutcome = Outcome | Literal["invalid"]

# The most severe first, each with its exit code. A regression remains one if other pairs cannot be compared.
_SEVERITY: tuple[tuple[PairOutcome, int], ...] = (
    ("regression", 1),
    ("invalid", InvalidRunError.exit_code),
    ("not enough evidence", NotEnoughEvidenceError.exit_code),
    ("no regression", 0),
    ("improvement", 0),
)


@dataclass(frozen=True)
class SampleResult:
    """A metric that is judged over runs. Shares and intervals are None where there are too few runs to judge.

    The fields of this class and of the next two are keys of the JSON document.
    """

    higher_is_worse: bool
    threshold: float
    floor: float
    old_runs: Sequence[float]
    new_runs: Sequence[float]
    change: float | None = None
    interval: tuple[float, float] | None = None
    worse_at_most: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class PointsResult:
    """The difference of a metric that is judged in percentage points, with its interval and upper bound."""

    difference: float
    difference_interval: tuple[float, float]
    difference_at_most: float


@dataclass(frozen=True)
class QualityTolerance:
    """The limits of a quality metric: the largest drop, and the smallest or the largest value that the plan allows."""

    drop_allowed: float | None = None
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class MetricResult:
    """The verdict on one metric. `old` and `new` are geometric means over runs; a metric of quality has one value."""

    name: str
    unit: str
    outcome: Outcome
    reason: str = ""
    old: float | None = None
    new: float | None = None
    repeats_needed: int | None = None
    sample: SampleResult | None = None
    points: PointsResult | None = None
    limits: QualityTolerance | None = None
    # The length of a run that has enough responses for the metric.
    seconds_needed: int | None = None

    @property
    def change(self) -> float | None:
        """Return the share by which the metric grew, if it is judged by a ratio."""
        return self.sample.change if self.sample else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the interval of `change`."""
        return self.sample.interval if self.sample else None

    def as_dict(self) -> dict[str, Any]:
        keys = ("name", "unit", "old", "new", "outcome", "reason", "repeats_needed")
        found = {key: getattr(self, key) for key in keys}
        for part in (self.sample, self.limits, self.points):
            found |= asdict(part) if part else {}
        return found


@dataclass(frozen=True)
class PairResult:
    """The result of one pair of receipts, of which `old` and `new` have the `facts`.

    `reasons` say why they cannot be compared; then there are no metrics. `allow`: the values of `--allow` with which
    they can be compared.
    """

    name: str
    old: JsonObject
    new: JsonObject | None
    outcome: PairOutcome
    reasons: Sequence[str] = ()
    interleaved: bool | None = None
    notes: Sequence[str] = ()
    metrics: Sequence[MetricResult] = ()
    allow: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        found = {key: value for key, value in vars(self).items() if key != "allow"}
        return found | {"metrics": [metric.as_dict() for metric in self.metrics]}


@dataclass(frozen=True)
class CompareResult:
    """The whole result. `family` is the number of metrics that share the error rate."""

    pairs: Sequence[PairResult]
    notes: Sequence[str]
    family: int

    @property
    def outcome(self) -> PairOutcome:
        """Return the outcome of the pair with the most severe one."""
        return self._most_severe[0]

    @property
    def exit_code(self) -> int:
        return self._most_severe[1]

    @property
    def _most_severe(self) -> tuple[PairOutcome, int]:
        outcomes = {pair.outcome for pair in self.pairs}
        return next((entry for entry in _SEVERITY if entry[0] in outcomes), _SEVERITY[-1])

    @property
    def repeats_needed(self) -> int | None:
        """Return the number of repeats per side that would decide every inconclusive metric."""
        needed = [metric.repeats_needed for pair in self.pairs for metric in pair.metrics if metric.repeats_needed]
        return max(needed, default=None)

    def metrics_with(self, outcome: PairOutcome) -> Iterator[MetricResult]:
        """Yield the metrics that have this outcome."""
        return (metric for pair in self.pairs for metric in pair.metrics if metric.outcome == outcome)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "schema": SCHEMA,
            "outcome": self.outcome,
            "exit_code": self.exit_code,
            "confidence": verdict.CONFIDENCE,
            "family": self.family,
            "repeats_needed": self.repeats_needed,
            "notes": list(self.notes),
            "configurations": [pair.as_dict() for pair in self.pairs],
        }


def facts(sealed: Receipt) -> JsonObject:
    """Return what the result says about a receipt."""
    return {
        "path": str(sealed.path),
        "seal": sealed.seal,
        "created": sealed.data["created"],
        "configuration": sealed.name,
        "precision": sealed.precision,
        "hardware": sealed.data["hardware"].get("name"),
        "image": (sealed.data.get("image") or {}).get("digest"),
        "model_sha256": sealed.weights_sha256,
        "repeats": len(sealed.runs),
    }


def problem(result: CompareResult) -> InferctlError | None:
    """Return the error that the command ends with; None if no regression was found."""
    if result.outcome == "invalid":
        reasons = (
            f"{pair.name}: {reason}" for pair in result.pairs if pair.outcome == "invalid" for reason in pair.reasons
        )
        return InvalidRunError(f"cannot be compared ({'; '.join(reasons)})", _advice_on_invalid(result))
    parts = [pair for pair in result.pairs if pair.outcome == result.outcome]
    found = [metric.name for pair in parts for metric in pair.metrics if metric.outcome == result.outcome]
    names = ", ".join(dict.fromkeys(found))
    if result.outcome == "regression":
        return InferctlError(f"regression: {names}", "each receipt names the files with the record of each request")
    if result.outcome == "not enough evidence":
        return NotEnoughEvidenceError(f"not enough evidence: {names}", advice(result))
    return None


def _advice_on_invalid(result: CompareResult) -> str:
    """Return what to do about pairs that cannot be compared."""
    invalid = [pair for pair in result.pairs if pair.outcome == "invalid"]
    if all(pair.allow for pair in invalid):
        options = dict.fromkeys(f"--allow {what}" for pair in invalid for what in pair.allow)
        return f"pass `{' '.join(options)}`"
    return "measure both again in one benchmark: `inferctl bench --url old=... --url new=...`"


def advice(result: CompareResult) -> str:
    """Return what to do to decide the inconclusive metrics: one action."""
    pairs = [pair for pair in result.pairs if pair.outcome == "not enough evidence"]
    inconclusive = [metric for pair in pairs for metric in pair.metrics if metric.outcome == "not enough evidence"]
    if any(metric.interval and not metric.repeats_needed and not metric.reason for metric in inconclusive):
        return (
            f"over {verdict.MAX_REPEATS} repeats would be needed: allow a larger change with `--threshold`, or measure "
            "longer runs on a quieter machine"
        )
    seconds = max((metric.seconds_needed or 0 for metric in inconclusive), default=0)
    repeats = max((metric.repeats_needed or 0 for metric in inconclusive), default=0)
    if options := [f"--duration {seconds}"] * bool(seconds) + [f"--repeats {repeats}"] * bool(repeats):
        return f"measure both again with `{' '.join(options)}`"
    return "; ".join(dict.fromkeys(metric.reason for metric in inconclusive))
