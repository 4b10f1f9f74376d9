"""Options of `inferctl bench` that replace values of a plan. Works on the keys of the plan, before their validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from inferctl.bench.plan.sections import Configuration, combine
from inferctl.bench.plan.shape import Keys
from inferctl.core.errors import UsageError


class Overrides(TypedDict, total=False):
    """Options of the command line that replace values of a plan. None and an absent key keep the plan's value."""

    users: int | None
    rate: float | None
    duration_s: float | None
    repeats: int | None
    load: Mapping[str, object] | None  # further keys of the load
    generation: Mapping[str, object] | None  # keys of `load.generation`
    batch_tokens: Sequence[int] | None  # each value multiplies the configurations
    corpora: Sequence[str] | None  # two or more multiply the configurations
    search: Mapping[str, object] | None  # keys of the search; an empty mapping requests a search with defaults
    slo_p99_ms: float | None  # of a search that the plan has
    budget_s: float | None


def apply(plan: Mapping[str, Any], precisions: Sequence[str] | None, overrides: Overrides) -> Keys:
    """Return the keys of a plan with the options. `precisions` replace the configurations.

    `plan`: the keys that are set, with complete `configurations`. Raises `UsageError`, and `ValidationError` for an
    invalid configuration.
    """
    changed: dict[str, Any] = {**plan, "load": _load(plan["load"], overrides)}
    if plan.get("generate"):
        changed["generate"] = _generate(plan["generate"], changed["load"], bool(precisions), overrides)
    if overrides.get("repeats") is not None:
        changed["repeats"] = overrides["repeats"]
    changed |= _search(plan, overrides)
    return changed | _configurations(plan, precisions, overrides)


def _load(own: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    users, rate = overrides.get("users"), overrides.get("rate")
    options = {"users": users, "rate": rate, "duration_s": overrides.get("duration_s"), **(overrides.get("load") or {})}
    load = {**own, **_given(options)}
    if users is not None or rate is not None:
        load.pop("auto_users", None)
    if rate is not None:
        load["mode"] = "open"
        load.pop("capacity_percent", None)
    if requests := _given(overrides.get("generation")):
        load["generation"] = merge_generation(load.get("generation") or {}, requests)
    return load


def _generate(own: Mapping[str, Any], load: Mapping[str, Any], precisions: bool, overrides: Overrides) -> Keys:
    """Return the `generate` section without what the options replace. `load`: with the options."""
    options = {key: overrides.get(key) for key in ("users", "rate", "duration_s")} | dict(overrides.get("load") or {})
    replaced = set(_given(options))
    if replaced & {"users", "rate"}:
        replaced |= {"users", "rate", "mode"}
    kept = {key: value for key, value in (own.get("load") or {}).items() if key not in replaced}
    requests = _given(overrides.get("generation"))
    if requests or kept.get("generation"):
        kept["generation"] = merge_generation(kept.get("generation") or load.get("generation") or {}, requests)
    changed: Keys = {**own, "load": kept}
    if precisions:
        changed.pop("configurations", None)
    if overrides.get("repeats") is not None or own.get("repeats") is None:
        changed.pop("repeats", None)
    return changed


def _search(plan: Mapping[str, Any], overrides: Overrides) -> Keys:
    """Return the changed keys of a search: `search` and `repeats`."""
    own, changed = plan.get("search"), dict[str, object]()
    if (search := overrides.get("search")) is not None:
        changed = {"search": {**(own or {}), **_given(search)}, "repeats": overrides.get("repeats") or 1}
    elif own is not None and overrides.get("slo_p99_ms"):
        changed = {"search": {**own, "slo_p99_ms": overrides["slo_p99_ms"]}}
    if (budget_s := overrides.get("budget_s")) is not None:
        searched = changed.get("search", own)
        if not isinstance(searched, dict):  # an empty one has its bounds in the load
            raise UsageError("`--budget` requires a search", "add `--search --slo MS`, or choose a plan with a search")
        changed["search"] = {**searched, "budget_s": budget_s}
    return changed


def _configurations(plan: Mapping[str, Any], precisions: Sequence[str] | None, overrides: Overrides) -> Keys:
    """Return `configurations`, multiplied by token budgets and corpora, and `corpus` if there is only one."""
    keys = [{"name": name, "precision": name} for name in dict.fromkeys(precisions or ())] or plan["configurations"]
    configurations = [Configuration.model_validate(each) for each in keys]
    changed: Keys = {}
    corpora = list(dict.fromkeys(overrides.get("corpora") or []))
    if len(corpora) == 1:
        changed["corpus"] = corpora.pop()
        configurations = [each.model_copy(update={"corpus": None}) for each in configurations]
    return {**changed, "configurations": combine(configurations, overrides.get("batch_tokens") or [], corpora)}


def merge_generation(own: Mapping[str, object], given: Mapping[str, object]) -> Keys:
    """Return the keys `own` of `load.generation` with `given` ones: one way to set the lengths replaces another."""
    lengths = ("input_tokens", "output_tokens", "lengths", "max_request_tokens")
    if not given.keys().isdisjoint(lengths):
        own = {key: value for key, value in own.items() if key not in lengths[: 4 if "input_tokens" in given else 3]}
    return {**own, **given}


def _given(options: Mapping[str, object] | None) -> Keys:
    return {key: value for key, value in (options or {}).items() if value is not None}
