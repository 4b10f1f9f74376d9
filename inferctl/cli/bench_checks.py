"""Checks of a benchmark before it starts: each one raises `UsageError` for a definition that cannot run."""

from __future__ import annotations

import math
from pathlib import Path

from inferctl.bench.measure import search
from inferctl.bench.measure.outcome import BenchTarget
from inferctl.bench.plan import prompts, workload
from inferctl.bench.plan.plan import Plan
from inferctl.core.errors import UsageError
from inferctl.models.model import ModelFolder


def check_configurations(plan: Plan, running_servers: bool) -> None:
    """Raise `UsageError` if a plan has no configuration to start, or one with keys that `--url` would ignore."""
    if not plan.configurations and not running_servers:
        raise UsageError(
            f"the plan {plan.name!r} has no configurations",
            "pass `--precision NAME` or `--url NAME=URL`, or add `configurations` to the plan",
        )
    for configuration in plan.configurations if running_servers else []:
        for key in ("max_batch_tokens", "corpus", "load", "checkpoint"):
            if getattr(configuration, key) is not None:
                raise UsageError(
                    "`--url` replaces the configurations of the plan, "
                    f"so `{key}` of {configuration.name!r} would have no effect",
                    "remove `configurations` from the plan, and set `corpus` and `load` in the plan itself",
                )


def check_corpora(plan: Plan, targets: list[BenchTarget]) -> None:
    """Read every corpus that the benchmark uses. Raises `UsageError` for one that does not exist or is not valid."""
    corpora = [plan.corpus, *(target.corpus for target in targets), plan.quality.corpus if plan.quality else None]
    for corpus in dict.fromkeys(name for name in corpora if name):
        workload.read_corpus(corpus)


def check_lengths(plan: Plan) -> None:
    """Raise `UsageError` if the lengths of generation requests cannot be read."""
    if plan.load.generation and plan.load.generation.lengths:
        prompts.read_lengths(plan.load.generation.lengths)


def check_checkpoints(targets: list[BenchTarget], model: Path | None) -> None:
    """Raise `UsageError` if the checkpoint of a target was not made of the weights in the folder `model`."""
    for target in targets:
        if target.checkpoint is None or model is None:
            continue
        checkpoint, why = ModelFolder(Path(target.checkpoint)), ""
        try:
            original = checkpoint.config.get("original_sha256")
        except UsageError as error:
            original, why = None, error.message
        expected = ModelFolder(model).digest
        if not why and original != expected:
            named = f"is {original[:12]}…" if isinstance(original, str) else "is missing"
            why = f"`original_sha256` in its config.json {named}, the digest of the model is {expected[:12]}…"
        if why:
            raise UsageError(
                f"the checkpoint of {target.name!r} is not one of this model: {why}",
                "write it from this model's folder, as `python benchmarks/prepare_int8.py MODEL_DIR OUTPUT_DIR` does; "
                "its path is relative to the plan file",
            )


def check_search(plan: Plan, targets: list[BenchTarget], slo_p99_ms: float | None) -> None:
    """Raise `UsageError` if a search has no SLO, or two, or if its budget is too short."""
    if search := plan.search:
        bounds = plan.load.generation and plan.load.generation.bounds
        if bounds and search.slo_p99_ms:
            raise UsageError(
                "a search has either a p99 SLO or bounds of TTFT and ITL",
                "remove `--slo`, or `--slo-ttft` and `--slo-itl`",
            )
        if not bounds:
            search.required_slo_ms(slo_p99_ms)
        if search.budget_s is not None:
            _check_budget(plan, targets, search.budget_s)


def _check_budget(plan: Plan, targets: list[BenchTarget], budget_s: float) -> None:
    """Raise `UsageError` if the budget is too short to search each server."""
    settings, count = plan.search, len(targets)
    assert settings is not None
    forecasts = [search.forecast(settings, plan.load_with(target.load), budget_s / count) for target in targets]
    if any(not forecast.enough for forecast in forecasts):
        minimum = math.ceil(count * max(forecast.seconds for forecast in forecasts))
        searches = "a search" if count == 1 else f"{count} searches"
        raise UsageError(
            f"the budget of {budget_s:g} s is too short for {searches}", f"pass `--budget {minimum}` (seconds) or more"
        )
