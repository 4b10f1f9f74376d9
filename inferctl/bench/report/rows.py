"""The rows of a result: one per configuration, and one per hardware that was requested but not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from inferctl.bench import privacy, stats
from inferctl.bench.judge import slo, summary
from inferctl.bench.judge.summary_types import GenerationSummary
from inferctl.bench.measure.outcome import Outcome
from inferctl.bench.report import received
from inferctl.receipts import noise
from inferctl.receipts.noise import Noise
from inferctl.receipts.receipt import JsonObject, Receipt

_EFFICIENCY = ("watts", "joules_per_1000_requests", "joules_per_million_texts", "cpu_seconds_per_1000_requests")
MEASURED, FAILED, NOT_RUN, NOT_MEASURED_HERE = "measured", "failed", "not run", "not measured here"


@dataclass(frozen=True)
class Row:
    """A row of a result. `reason` says why a configuration has no figures, or why it failed.

    A row without a receipt was not measured. `hardware` is known for a measured row and for other hardware.
    """

    configuration: str
    outcome: str
    reason: str | None = None
    precision: JsonObject = field(default_factory=dict)
    valid: bool = False
    reasons: Sequence[str] = ()
    cautions: Sequence[str] = ()
    receipt: str | None = None
    hardware: JsonObject | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return an element of the `rows` key of a result."""
        row = asdict(self)
        return row if self.hardware else {key: value for key, value in row.items() if key != "hardware"}


@dataclass(frozen=True)
class RunFigures:
    """The figures of one run that comparisons use."""

    repeat: int
    requests_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    output_tokens_per_s: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class SloAtLoad:
    """Whether the SLO is met at the load of the benchmark; `met` is None if that is inconclusive.

    It is a limit of the p99 or, for generation, `bounds_ms` of TTFT and ITL.
    """

    p99_ms: float | None
    met: bool | None
    reason: str
    bounds_ms: Mapping[str, float] | None = None


@dataclass(frozen=True)
class MeasuredRow(Row):
    """A row with figures, from a receipt.

    `mode` is that of the load (open or closed), and `received` the load in words. `noise` is what else used the cores,
    above its limit. `workload` has the corpus, and the keys of the load that differ from the plan's. `search`,
    `concurrency`, `stages`, `names`, `profile` and `quality` are sections of the receipt. For the task rerank, the
    quality has a score difference (maximum, absolute) and Kendall's tau (mean) instead of cosine and recall.
    `closed_loop` is the one before an open loop whose rate is a share of its capacity (`reference_rps`). `generation`
    has the figures of generation (`GenerationSummary`), `kl_mean` its mean KL divergence and `top_1` its top-1
    agreement, or for classify the share of texts with the same label.
    `matrix_share_percent` is the share of the server's `matrix_rate` (see `GET /info`) that batches used.
    `p99_effective_n` is the effective sample size of the p99. If it is too small, the true p99 may be higher than the
    interval.
    """

    task: str = "embed"
    mode: str = "closed"
    received: str = ""
    noise: Sequence[Noise] = ()
    max_batch_tokens: int | None = None
    workload: tuple[str | None, JsonObject | None] = (None, None)
    search: JsonObject | None = None
    closed_loop: JsonObject | None = None
    concurrency: JsonObject | None = None
    stages: Sequence[JsonObject] | None = None
    names: Sequence[JsonObject] | None = None
    url: str | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    p50_interval_ms: tuple[float | None, float | None] = (None, None)
    p99_interval_ms: tuple[float | None, float | None] = (None, None)
    p99_effective_n: int | None = None
    slo: SloAtLoad | None = None
    runs: Sequence[RunFigures] = ()
    n: int = 0
    requests: int = 0
    failed: int = 0
    rejected: int = 0
    rejected_percent: float = 0.0
    late: int = 0
    dropped: int = 0
    requests_per_s: float = 0.0
    requests_per_s_interval: JsonObject | None = None
    tokens_per_s: float | None = None
    pairs_per_s: float | None = None
    generation: JsonObject | None = None
    server_peak_bytes: float | None = None
    watts: float | None = None
    joules_per_1000_requests: float | None = None
    joules_per_million_texts: float | None = None
    cpu_seconds_per_1000_requests: float | None = None
    usd_per_million_texts: float | None = None
    price: JsonObject | None = None
    gpu_utilisation_percent: float | None = None
    matrix_share_percent: float | None = None
    matrix_rate: JsonObject | None = None
    profile: JsonObject | None = None
    quality: JsonObject = field(default_factory=lambda: {"checked": False})
    cosine_mean: float | None = None
    recall_at_10: float | None = None
    score_difference: float | None = None
    kendall: float | None = None
    kl_mean: float | None = None
    top_1: float | None = None


def of_outcome(outcome: Outcome, receipt: Receipt | None, slo_p99_ms: float | None = None) -> Row:
    """Return the row of a benchmark target, from its receipt if it has one."""
    if receipt is None:
        reason = privacy.without_folders(outcome.failure or outcome.interrupted or "no run is complete")
        return Row(outcome.target.name, NOT_RUN, reason, {"requested": outcome.target.precision})
    data = receipt.data
    figures, quality = data["summary"], data["quality"]
    latency, rerank = figures["latency_ms"], receipt.task == "rerank"
    return MeasuredRow(
        task=receipt.task,
        mode="closed" if figures["offered"] is None else "open",
        received=received.describe(data),
        noise=noise.of_receipt(data),
        configuration=receipt.name,
        outcome=FAILED if outcome.failure else MEASURED,
        reason=privacy.without_folders(outcome.failure),
        precision=data["precision"],
        **data["validity"],
        receipt=str(receipt.path),
        hardware=data["hardware"],
        max_batch_tokens=data["configuration"].get("max_batch_tokens"),
        workload=(data["workload"]["corpus"], privacy.without_lengths_folder(outcome.target.load or {}) or None),
        search=data.get("search"),
        profile=data.get("profile"),
        closed_loop=_closed_loop(data.get("closed_loop")),
        concurrency=data.get("concurrency"),
        stages=data.get("stages"),
        names=data.get("names"),
        url=data["configuration"]["url"],
        **{f"{key}_ms": latency[key]["value"] for key in ("p50", "p90", "p99")},
        p50_interval_ms=(latency["p50"]["low"], latency["p50"]["high"]),
        p99_interval_ms=(latency["p99"]["low"], latency["p99"]["high"]),
        p99_effective_n=stats.effective_size(latency["n"], latency["p99"].get("dependence")),
        slo=_slo(data, slo_p99_ms or (data.get("slo") or {}).get("p99_ms")),
        runs=[_run_figures(run) for run in data["runs"] if run.get("summary")],
        n=latency["n"],
        requests=figures["requests"],
        failed=sum(summary.failures(figures).values()),
        rejected=figures.get("rejected", 0),
        rejected_percent=figures.get("rejected_percent", 0.0),
        late=figures["late"],
        dropped=figures["dropped"],
        requests_per_s=figures["requests_per_s"],
        requests_per_s_interval=figures["requests_per_s_interval"],
        tokens_per_s=figures["tokens_per_s"],
        pairs_per_s=figures["texts_per_s"] if rerank else None,
        generation=_generation(figures) if receipt.task == "generate" else None,
        server_peak_bytes=data["resources"].get("server_peak_bytes"),
        **_costs(data),
        matrix_share_percent=data["resources"].get("matrix_share_percent"),
        matrix_rate=(data["server"].get("compute") or {}).get("matrix_rate"),
        quality=quality,
        cosine_mean=(quality.get("cosine") or {}).get("mean"),
        recall_at_10=quality.get("recall_at_10"),
        score_difference=(quality.get("score_difference") or {}).get("max"),
        kendall=quality.get("kendall"),
        kl_mean=(quality.get("kl") or {}).get("mean"),
        top_1=quality.get("top_1") if receipt.task == "classify" else (quality.get("agreement") or {}).get("share"),
    )


def _generation(figures: JsonObject) -> JsonObject:
    """Return the figures of generation in a summary, and the tokens of the prompts."""
    found = {key: figures[key] for key in GenerationSummary.__annotations__}
    return {**found, "input_tokens_per_request": figures["tokens_per_request"]}


def _slo(data: JsonObject, limit_ms: float | None) -> SloAtLoad | None:
    """Return whether the SLO is met at this load; None without an SLO."""
    budget = (data["plan"].get("error_budget_percent") or 0) / 100
    if found := data["summary"].get("goodput"):
        judged = slo.judge_bounds(data["summary"], budget)
        return SloAtLoad(None, judged.met, judged.reason, summary.bounds_of(found))
    if not limit_ms:
        return None
    judged = slo.judge(data["summary"]["latency_ms"], limit_ms, summary.lost_requests(data["summary"]), budget)
    return SloAtLoad(limit_ms, judged.met, judged.reason)


def _run_figures(run: JsonObject) -> RunFigures:
    found = run["summary"]
    latency = found["latency_ms"]
    return RunFigures(
        run["repeat"],
        found["requests_per_s"],
        latency["p50"]["value"],
        latency["p99"]["value"],
        found.get("output_tokens_per_s"),
        found.get("seconds"),
    )


def _costs(data: JsonObject) -> dict[str, Any]:
    """Return energy, price and GPU utilization; None for what is unknown. `price` is the lowest of the catalog."""
    found = data.get("efficiency") or {}
    cheapest = next(iter(found.get("cost") or ()), None)
    gpus = [gpu for run in data["runs"] for gpu in (run.get("telemetry") or {}).get("gpus", ())]
    utilization = [gpu["utilisation_percent"]["mean"] for gpu in gpus if gpu["utilisation_percent"]]
    return {
        **{name: found.get(name) for name in _EFFICIENCY},
        "usd_per_million_texts": cheapest["usd_per_million_texts"] if cheapest else None,
        "price": cheapest,
        "gpu_utilisation_percent": round(sum(utilization) / len(utilization), 1) if utilization else None,
    }


def _closed_loop(found: JsonObject | None) -> JsonObject | None:
    if not found:
        return None
    figures = {key: found["summary"][key] for key in ("requests_per_s", "requests_per_s_interval", "runs")}
    return {"users": found["users"], "reference_rps": found["reference_rps"], **figures}
