"""From outcomes to receipts, and to the one document that the table, the report and `--json` show."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inferctl
from inferctl import catalog
from inferctl.bench import privacy, receipt
from inferctl.bench.judge import efficiency, slo, stages, summary
from inferctl.bench.load import target
from inferctl.bench.measure import neighbors, runner, throughput
from inferctl.bench.measure.environment import Environment
from inferctl.bench.plan.plan import Load, Plan
from inferctl.bench.report import estimated, findings
from inferctl.errors import InferctlError, InvalidRunError

SCHEMA = "inferctl.bench/1"


@dataclass(frozen=True)
class Context:
    """What receipts say about the bench as a whole. `hardware_wanted` are the catalog keys that the spec asks for; `subjects` is what
    was measured, when that is not what the plan lists; `model` is the folder that estimates take the model's sizes from."""

    plan: Plan
    environment: Environment
    model_source: str | None
    hardware_wanted: Sequence[str]
    slo_p99_ms: float | None
    output: Path
    subjects: Sequence[runner.Subject] = ()
    model: Path | None = None


def receipts(context: Context, outcomes: Sequence[runner.Outcome]) -> list[receipt.Receipt]:
    """Write one receipt for each outcome that has at least one run."""
    return [
        receipt.write(
            context.output / "receipts" / f"{outcome.subject.name}.json",
            privacy.without_home(_receipt(context, outcome)),
        )
        for outcome in outcomes
        if outcome.measurements
    ]


def _receipt(context: Context, outcome: runner.Outcome) -> dict[str, Any]:
    budget = context.plan.error_budget_percent
    pooled, each, whole = runner.judge(outcome, context.environment.machine_cores, budget)
    info, subject = _nameless(outcome.info), outcome.subject
    parts = [m.part for m in outcome.measurements]
    hardware = hardware_of(info, subject, context.environment)
    sent = outcome.measurements[0].load
    load = Load.model_validate(sent) if sent else None
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inferctl": inferctl.__version__,
        "configuration": _configuration(subject),
        "plan": _plan(context, outcome),
        "slo": {"p99_ms": context.slo_p99_ms},
        "workload": outcome.measurements[0].workload,
        "model": {**(info.get("model") or {}), "source": _source(context, info, subject)},
        "precision": precision_of(info, subject),
        "hardware": hardware,
        "environment": context.environment.as_dict(),
        "server": info,
        "image": info.get("image"),
        "summary": pooled,
        "resources": _worst(outcome.measurements),
        "efficiency": dataclasses.asdict(
            efficiency.efficiency(
                pooled,
                [m.telemetry for m in outcome.measurements],
                [(summary.summarise([m.part]), m.resources) for m in outcome.measurements],
                hardware["key"],
            )
        ),
        "quality": privacy.without_folders(outcome.quality),
        "validity": privacy.without_folders(whole.as_dict()),
        "curve": summary.latency_curve(parts),
        "stages": stages.summarise(parts, load) if load else [],
        "search": privacy.without_folders(outcome.measurements[0].search),
        "neighbours": privacy.without_folders(
            neighbors.document(outcome.measurements, context.environment.machine_cores, budget)
        ),
        "closed_loop": throughput.pooled(outcome.measurements),
        "concurrency": outcome.measurements[0].concurrency,
        "runs": [
            {
                "repeat": m.run.repeat,
                "started": datetime.datetime.fromtimestamp(m.started, datetime.UTC).isoformat(timespec="milliseconds"),
                "ready_seconds": m.info.get("ready_seconds"),
                "serial": m.serial,
                "workload": {key: m.workload.get(key) for key in ("seed", "sha256")},
                "server": _nameless(m.info),
                "summary": summary.summarise([m.part]),
                "closed_loop": throughput.of_run(m),
                "resources": m.resources,
                "pace": m.pace,
                "telemetry": m.telemetry,
                "validity": privacy.without_folders(verdict.as_dict()),
                "warmup": {"settled": m.state.get("steady"), "windows": m.state.get("windows")},
                "locust_percentiles_ms": m.state.get("locust_percentiles_ms"),
                "timeline": summary.timeline(m.part),
                "latency_over_time": summary.over_time(m.part),
                "recovery": stages.recovery(m.part, load).as_dict() if load and len(load.timeline) > 2 else None,
                "records": [
                    {
                        "path": file.relative_to(context.output).as_posix(),
                        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                    }
                    for file in sorted(m.folder.glob("requests-*.bin"))
                ],
            }
            for m, verdict in zip(outcome.measurements, each, strict=True)
        ],
    }


def _configuration(subject: runner.Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "precision": subject.precision,
        "max_batch_tokens": subject.max_batch_tokens,
        "url": subject.url,
        "this_machine": subject.url is None or target.is_local(subject.url),
    }


def _plan(context: Context, outcome: runner.Outcome) -> dict[str, Any]:
    """The plan with what was really measured in the place of its configurations, and the load and corpus of this one."""
    plan = context.plan.model_dump(mode="json")
    plan["load"] = privacy.traceless(outcome.measurements[0].load)
    plan["corpus"] = privacy.name_of(outcome.subject.corpus or plan["corpus"])
    if plan["quality"]:
        plan["quality"]["corpus"] = privacy.name_of(plan["quality"]["corpus"])
    if context.subjects:
        plan["configurations"] = [
            {key: value for key, value in dataclasses.asdict(one).items() if value is not None}
            for one in context.subjects
        ]
    for one in plan["configurations"]:
        one |= {"corpus": privacy.name_of(one["corpus"])} if one.get("corpus") else {}
        one |= {"load": privacy.traceless(one["load"])} if one.get("load") else {}
    return plan


def _source(context: Context, info: dict[str, Any], subject: runner.Subject) -> str | None:
    """Where the weights come from: for our own servers as the spec says it, since they are started with the folder that it leads to."""
    said = (info.get("model") or {}).get("source")
    source = said if subject.url and said else context.model_source or said
    return privacy.name_of(source) if source else None


def _nameless(info: dict[str, Any]) -> dict[str, Any]:
    """`GET /info` without the folders above the model's."""
    found = dict(info)
    for key, name in (("model", "source"), ("api", "model")):
        section = info.get(key) or {}
        if section.get(name):
            found[key] = {**section, name: privacy.name_of(section[name])}
    return found


def precision_of(info: dict[str, Any], subject: runner.Subject) -> dict[str, Any]:
    """Requested and effective precision as the server states them; None where it does not."""
    said = info.get("precision") or {}
    return {key: said.get(key) for key in ("effective", "level", "reason", "method", "tf32")} | {
        "requested": said.get("requested") or subject.precision
    }


def hardware_of(info: dict[str, Any], subject: runner.Subject, environment: Environment) -> dict[str, Any]:
    """What the server ran on: its own word for it, else (for a server that we started) this machine."""
    device = info.get("device") or {}
    if device.get("name"):
        key = device.get("hardware") or ("cpu" if device.get("kind") == "cpu" else None)
        here = subject.url is None or target.is_local(subject.url)
        name = environment.cpu_model if device["name"].lower() == "cpu" and here else device["name"]
        return {"key": key, "name": name, "kind": device.get("kind"), "detected_by": "server"}
    # On a machine with a GPU a server that says nothing may have run on either.
    if subject.url or environment.gpus:
        return {"key": None, "name": "not stated", "kind": None, "detected_by": None}
    return {"key": "cpu", "name": environment.cpu_model, "kind": "cpu", "detected_by": "bench"}


def _worst(measurements: Sequence[runner.Measurement]) -> dict[str, float]:
    """The highest of each resource figure over the runs."""
    keys = {key for m in measurements for key in m.resources}
    return {key: max(m.resources[key] for m in measurements if key in m.resources) for key in sorted(keys)}


def document(
    context: Context, outcomes: Sequence[runner.Outcome], written: Sequence[receipt.Receipt], report: Path
) -> dict[str, Any]:
    """What `--json` prints; docs/bench.md describes every key."""
    context = dataclasses.replace(context, plan=_as_run(context.plan, outcomes))
    by_name = {one.name: one for one in written}
    rows = [_row(outcome, by_name.get(outcome.subject.name), context.slo_p99_ms) for outcome in outcomes]
    rows += _not_measured(context, rows)
    found = findings.state(rows, context.plan.load.mode, context.plan.error_budget_percent)
    caveats = [{"kind": kind, "text": text} for kind, text in findings.caveats(rows)]
    return {
        "schema": SCHEMA,
        "plan": context.plan.name,
        "load": privacy.traceless(context.plan.load.model_dump(mode="json")),
        "repeats": context.plan.repeats,
        "finding": found[0],
        "findings": found,
        "caveats": caveats,
        "rows": rows,
        "environment": context.environment.as_dict(),
        "output": str(context.output),
        "report": str(report),
    }


def _as_run(plan: Plan, outcomes: Sequence[runner.Outcome]) -> Plan:
    """Return the plan with the number of users that was found, where it says `users: auto`."""
    found = next((m.concurrency for one in outcomes for m in one.measurements if m.concurrency), None)
    if not found or not plan.load.auto_users:
        return plan
    return plan.model_copy(update={"load": plan.load.model_copy(update={"users": found["users"]})})


def write(path: Path, result: dict[str, Any]) -> None:
    """Keep the document beside its receipts."""
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _row(outcome: runner.Outcome, sealed: receipt.Receipt | None, slo_p99_ms: float | None = None) -> dict[str, Any]:
    if sealed is None:
        why = privacy.without_folders(outcome.failure or outcome.interrupted or "no run was made")
        return _empty(outcome.subject.name, "not run", why) | {"precision": {"requested": outcome.subject.precision}}
    data = sealed.data
    latency, cosine = data["summary"]["latency_ms"], data["quality"].get("cosine") or {}
    return {
        "configuration": sealed.name,
        "max_batch_tokens": data["configuration"].get("max_batch_tokens"),
        "workload": [data["workload"]["corpus"], _asked(outcome)],
        "search": data.get("search"),
        "neighbours": _beside(data.get("neighbours")),
        "closed_loop": _closed(data.get("closed_loop")),
        "concurrency": data.get("concurrency"),
        "stages": data.get("stages"),
        "recovery": [run["recovery"] for run in data["runs"] if run.get("recovery")],
        "outcome": "failed" if outcome.failure else "measured",
        "reason": privacy.without_folders(outcome.failure),
        "precision": data["precision"],
        "hardware": data["hardware"],
        "url": data["configuration"]["url"],
        **{f"{key}_ms": latency[key]["value"] for key in ("p50", "p90", "p99")},
        "p50_interval_ms": [latency["p50"]["low"], latency["p50"]["high"]],
        "p99_interval_ms": [latency["p99"]["low"], latency["p99"]["high"]],
        "slo": _slo(data, slo_p99_ms or (data.get("slo") or {}).get("p99_ms")),
        "runs": [_figures(run) for run in data["runs"] if run.get("summary")],
        "n": latency["n"],
        "requests": data["summary"]["requests"],
        "failed": sum(summary.failures(data["summary"]).values()),
        "rejected": data["summary"].get("rejected", 0),
        "rejected_percent": data["summary"].get("rejected_percent", 0.0),
        "late": data["summary"]["late"],
        "dropped": data["summary"]["dropped"],
        "requests_per_s": data["summary"]["requests_per_s"],
        "requests_per_s_interval": data["summary"]["requests_per_s_interval"],
        "tokens_per_s": data["summary"]["tokens_per_s"],
        "server_peak_bytes": data["resources"].get("server_peak_bytes"),
        **_costs(data),
        "quality": data["quality"],
        "cosine_mean": cosine.get("mean"),
        "recall_at_10": data["quality"].get("recall_at_10"),
        **data["validity"],
        "receipt": str(sealed.path),
    }


def _slo(data: dict[str, Any], limit: float | None) -> dict[str, Any] | None:
    """Return whether the SLO is met at this load (null: inconclusive) and why; None without an SLO."""
    if not limit:
        return None
    budget = (data["plan"].get("error_budget_percent") or 0) / 100
    judged = slo.judge(data["summary"]["latency_ms"], limit, summary.lost_share(data["summary"]), budget)
    return {"p99_ms": limit, "met": judged.met, "reason": judged.reason}


def _figures(run: dict[str, Any]) -> dict[str, Any]:
    """Return what configurations are compared by, of one run."""
    latency = run["summary"]["latency_ms"]
    values = {f"{key}_ms": latency[key]["value"] for key in ("p50", "p99")}
    return {"repeat": run["repeat"], "requests_per_s": run["summary"]["requests_per_s"], **values}


def _asked(outcome: runner.Outcome) -> dict[str, Any] | None:
    """In what the load differs from the plan's; two traces of one name are told apart by what was sent."""
    changes = outcome.subject.load
    if not changes or not changes.get("trace"):
        return changes
    sent = str(outcome.measurements[0].workload.get("sha256"))[:8]
    return {**changes, "trace": f"{privacy.name_of(changes['trace'])} ({sent})"}


def _costs(data: dict[str, Any]) -> dict[str, Any]:
    """What a row says of energy, money and GPUs; None where it is not known."""
    spent = data.get("efficiency") or {}
    cheapest = next(iter(spent.get("cost") or ()), None)
    gpus = [gpu for run in data["runs"] for gpu in (run.get("telemetry") or {}).get("gpus", ())]
    busy = [gpu["utilisation_percent"]["mean"] for gpu in gpus if gpu["utilisation_percent"]]
    return {
        **{key: spent.get(key) for key in ("watts", "joules_per_1000_requests", "joules_per_million_texts")},
        "cpu_seconds_per_1000_requests": spent.get("cpu_seconds_per_1000_requests"),
        "usd_per_million_texts": cheapest["usd_per_million_texts"] if cheapest else None,
        "price": cheapest,
        "gpu_utilisation_percent": round(sum(busy) / len(busy), 1) if busy else None,
    }


def _closed(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a row says of the closed loop before an open one at a share of the capacity."""
    if not found:
        return None
    figures = {key: found["summary"][key] for key in ("requests_per_s", "requests_per_s_interval", "runs")}
    return {key: found[key] for key in ("users", "reference_rps")} | figures


def _beside(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a row says of busy neighbours."""
    return found and {key: value for key, value in found.items() if key not in ("runs", "cautions")}


def _empty(name: str, outcome: str, reason: str) -> dict[str, Any]:
    return {
        "configuration": name,
        "outcome": outcome,
        "reason": reason,
        "precision": {},
        "valid": False,
        "reasons": [],
        "cautions": [],
        "receipt": None,
    }


def _not_measured(context: Context, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each part that the spec asks for and that no row ran on; a GPU that no server used was not measured."""
    ran_on = [row["hardware"] for row in rows if row.get("hardware")]
    present = {hardware["key"] for hardware in ran_on}
    names = ", ".join(dict.fromkeys(hardware["name"] for hardware in ran_on))
    reason = f"the hardware measured is {names}" if names else "nothing was measured"
    known = catalog.hardware_profiles()
    return [
        row
        for key in context.hardware_wanted
        if key not in present
        for row in _elsewhere(context, {"key": key, "name": known[key].name if key in known else key}, reason)
    ]


def _elsewhere(context: Context, hardware: dict[str, Any], reason: str) -> list[dict[str, Any]]:
    """Rows of a part that is not here: estimated, or one for each reason why not."""
    rows: list[dict[str, Any]] = []
    reasons: dict[str, list[str]] = {}
    for subject, figures in estimated.each(context.plan, context.subjects, context.model, hardware["key"]):
        if isinstance(figures, str):
            reasons.setdefault(figures, []).append(subject.name)
            continue
        precision = {"requested": subject.precision, "effective": figures["precision"]}
        why = f"{reason}; estimated from {figures['rests_on']}"
        rows.append(_empty(subject.name, "estimated", why) | {"precision": precision, "estimate": figures})
    rows += [
        _empty(f"{hardware['key']}: {', '.join(names)}", "not measured here", f"{reason}; not estimated: {why}")
        for why, names in reasons.items()
    ]
    found = rows or [_empty(hardware["key"], "not measured here", reason)]
    return [row | {"hardware": hardware} for row in found]


def verdict(result: dict[str, Any]) -> InferctlError | None:
    """The error that a bench ends with: nothing could be measured, or something that was measured is invalid. None when all is well."""
    rows = [row for row in result["rows"] if row["outcome"] not in ("not measured here", "estimated")]
    measured = [row for row in rows if row["receipt"]]
    if not measured:
        reasons = "; ".join(f"{row['configuration']}: {row['reason']}" for row in rows)
        return InferctlError(
            f"nothing could be measured ({reasons})", f"the servers' logs are in {result['output']}/runs"
        )
    invalid = [row for row in measured if not row["valid"]]
    if invalid:
        reasons = "; ".join(f"{row['configuration']}: {row['reasons'][0]}" for row in invalid)
        which = (
            "the run is" if len(invalid) == len(measured) else f"{len(invalid)} of {len(measured)} configurations are"
        )
        return InvalidRunError(
            f"{which} invalid ({reasons})", "the receipts say so too; mend the cause and measure again"
        )
    return None
