"""Write one receipt per benchmark target."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import inferctl
from inferctl.bench import privacy
from inferctl.bench.judge import efficiency, stages, summary
from inferctl.bench.judge.validity import Validity
from inferctl.bench.load import records
from inferctl.bench.load.target import is_local
from inferctl.bench.measure import closed_loop
from inferctl.bench.measure.bench import Bench
from inferctl.bench.measure.environment import Environment
from inferctl.bench.measure.judgment import judge_outcome
from inferctl.bench.measure.outcome import BenchTarget, Measurement, Outcome
from inferctl.bench.plan.shape import Load
from inferctl.receipts import receipt
from inferctl.receipts.receipt import JsonObject


def sealed(bench: Bench, outcomes: Sequence[Outcome]) -> list[receipt.Receipt]:
    """Return one receipt for each outcome that has at least one run."""
    measured, folder = (outcome for outcome in outcomes if outcome.measurements), bench.output / "receipts"
    documents = ((each.target.name, privacy.without_home(_document(bench, each))) for each in measured)
    return [receipt.sealed(folder / f"{name}.json", document) for name, document in documents]


def write_all(bench: Bench, outcomes: Sequence[Outcome]) -> list[receipt.Receipt]:
    """Write the receipts of `sealed`, and return them."""
    return [receipt.save(each) for each in sealed(bench, outcomes)]


def _document(bench: Bench, outcome: Outcome) -> dict[str, Any]:
    """Return a receipt (docs/receipts.md describes each key)."""
    budget, cores = bench.plan.error_budget_percent, bench.environment.machine_cores
    judged = judge_outcome(outcome, cores, budget)
    info, target, runs = _without_paths(outcome.info), outcome.target, outcome.measurements
    first, parts = runs[0], [part for run in runs for part in run.all_records]
    hardware = hardware_of(info, target, bench.environment)
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inferctl": inferctl.__version__,
        "configuration": _configuration(target),
        "plan": _plan(bench, outcome),
        "slo": {"p99_ms": bench.slo_p99_ms, **_bounds(first.load)},
        "workload": dataclasses.asdict(first.workload),
        "model": {**(info.get("model") or {}), "source": _source(bench, info, target)},
        "precision": precision_of(info, target),
        "hardware": hardware,
        "environment": bench.environment.as_dict(),
        "server": info,
        "image": info.get("image"),
        "summary": judged.summary,
        "resources": _highest([run.resources for run in runs]),
        "efficiency": efficiency.efficiency(
            judged.summary,
            [run.telemetry.as_dict() for run in runs],
            [(summary.summarize([run.records]), run.resources) for run in runs],
            hardware["key"],
        ),
        "quality": privacy.without_folders(outcome.quality.as_dict()),
        "retrieval": outcome.retrieval and privacy.without_folders(outcome.retrieval.as_dict()),
        "validity": privacy.without_folders(judged.validity.as_dict()),
        **summary.curves(parts),
        "stages": stages.summarize(parts, first.load) if first.load else [],
        "names": summary.of_names(parts, first.load) if first.load else [],
        "search": privacy.without_folders(first.search),
        "profile": outcome.profile,
        "closed_loop": closed_loop.pooled(runs),
        "concurrency": first.concurrency and first.concurrency.as_dict(),
        "runs": [_run(bench, run, validity) for run, validity in zip(runs, judged.runs, strict=True)],
    }


def _run(bench: Bench, run: Measurement, validity: Validity) -> dict[str, Any]:
    """Return an element of the `runs` key of a receipt."""
    folder = run.folder.relative_to(bench.output)
    return {
        "repeat": run.run.repeat,
        "started": datetime.datetime.fromtimestamp(run.started, datetime.UTC).isoformat(timespec="milliseconds"),
        "ready_seconds": run.info.get("ready_seconds"),
        "serial": run.serial,
        "workload": {"seed": run.workload.seed, "sha256": run.workload.sha256},
        "server": _without_paths(run.info),
        "summary": summary.summarize([run.records]),
        "closed_loop": closed_loop.of_run(run),
        "resources": run.resources,
        "pace": run.pace,
        "telemetry": run.telemetry.as_dict(),
        "validity": privacy.without_folders(validity.as_dict()),
        "warmup": {"settled": run.state.get("steady"), "windows": run.state.get("windows")},
        "timeline": summary.timeline(run.records),
        "latency_over_time": summary.over_time(run.records),
        "records": [
            {"path": (folder / name).as_posix(), "sha256": digest}
            for name, digest in records.digests(run.folder).items()
        ],
    }


def _configuration(target: BenchTarget) -> dict[str, Any]:
    return {
        "name": target.name,
        "precision": target.precision,
        "max_batch_tokens": target.max_batch_tokens,
        "checkpoint": target.checkpoint and privacy.name_of(target.checkpoint),
        "url": target.url,
        "this_machine": target.url is None or is_local(target.url),
    }


def _bounds(load: Load | None) -> dict[str, float | None]:
    """Return the bounds of a good response, for generation."""
    settings = load and load.generation
    return {"ttft_ms": settings.ttft_ms, "itl_ms": settings.itl_ms} if settings else {}


def load_without_folder(load: Load | None) -> dict[str, Any]:
    """Return a load in JSON form, with the name of its lengths instead of the path; empty for None."""
    return privacy.without_lengths_folder(load.model_dump(mode="json")) if load else {}


def _plan(bench: Bench, outcome: Outcome) -> dict[str, Any]:
    """Return the plan with the measured targets as its configurations, and the load and corpus of this target."""
    plan = bench.plan.model_dump(mode="json")
    plan["load"] = load_without_folder(outcome.measurements[0].load)
    plan["corpus"] = privacy.name_of(outcome.target.corpus or plan["corpus"])
    if plan["quality"]:
        plan["quality"]["corpus"] = privacy.name_of(plan["quality"]["corpus"])
    plan["configurations"] = [
        {key: value for key, value in dataclasses.asdict(target).items() if value is not None}
        for target in bench.targets
    ]
    for configuration in plan["configurations"]:
        for key in ("corpus", "checkpoint", "model"):
            configuration |= {key: privacy.name_of(configuration[key])} if configuration.get(key) else {}
        configuration |= (
            {"load": privacy.without_lengths_folder(configuration["load"])} if configuration.get("load") else {}
        )
    return plan


def _source(bench: Bench, info: JsonObject, target: BenchTarget) -> str | None:
    """Return the source of the weights.

    A server that inferctl starts reports the folder of the weights, so the source in the spec is used instead.
    """
    reported = (info.get("model") or {}).get("source")
    source = reported if target.url and reported else target.model or bench.model_source or reported
    return privacy.name_of(source) if source else None


def _without_paths(info: JsonObject) -> dict[str, Any]:
    """Return `GET /info` with the name of the model folder instead of its path."""
    found = dict(info) | ({"model_id": privacy.name_of(info["model_id"])} if info.get("model_id") else {})
    if models := info.get("models"):
        found["models"] = [_without_paths(each) for each in models]
    for key, name in (("model", "source"), ("api", "model")):
        section = info.get(key) or {}
        if section.get(name):
            found[key] = {**section, name: privacy.name_of(section[name])}
    return found


def precision_of(info: JsonObject, target: BenchTarget) -> dict[str, Any]:
    """Return requested and effective precision as the server reports them; None for what it does not report."""
    reported = info.get("precision") or {}
    return {key: reported.get(key) for key in ("effective", "level", "reason", "method", "tf32")} | {
        "requested": reported.get("requested") or target.precision
    }


def hardware_of(info: JsonObject, target: BenchTarget, environment: Environment) -> dict[str, Any]:
    """Return the hardware that the server reports, else (for a server that inferctl started) this machine."""
    device = info.get("device") or {}
    if device.get("name"):
        key = device.get("hardware") or ("cpu" if device.get("kind") == "cpu" else None)
        local = target.url is None or is_local(target.url)
        name = environment.cpu_model if device["name"].lower() == "cpu" and local else device["name"]
        return {"key": key, "name": name, "kind": device.get("kind"), "detected_by": "server"}
    # On a machine with a GPU, a server that reports no device may run on CPU or GPU.
    if target.url or environment.gpus:
        return {"key": None, "name": "not stated", "kind": None, "detected_by": None}
    return {"key": "cpu", "name": environment.cpu_model, "kind": "cpu", "detected_by": "bench"}


def _highest(resources: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the highest value of each resource over the runs."""
    keys = {key for used in resources for key in used}
    return {key: max(used[key] for used in resources if key in used) for key in sorted(keys)}
