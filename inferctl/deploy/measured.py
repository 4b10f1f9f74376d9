"""Reads the rate of a flavor, and what else its receipt measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from inferctl.config.spec import Slo
from inferctl.config.spec_types import Precision
from inferctl.core.errors import NotEnoughEvidenceError, UsageError
from inferctl.deploy.figure import shown
from inferctl.deploy.plan import Rate, Warned
from inferctl.facts.catalog import Hardware
from inferctl.receipts import capacity, receipt

# Digits of a seal that identify a receipt in a comment.
_SEAL_DIGITS = 8
# The limits of tokens_per_second in the spec.
_LOWEST_RATE, _HIGHEST_RATE = 0.001, 1e9


def read(
    path: Path, hardware: Hardware, task: str, digest: Callable[[], str] | None = None, slo: Slo | None = None
) -> Warned[tuple[Rate, str]]:
    """Return the rate of a receipt and the precision that it measured.

    `digest`: returns the sha256 of the model; None if the model is not on this machine. A receipt of another model is a
    warning, and so is one whose search allowed longer latencies than `slo`.

    A receipt with `sample: true` has invented figures, for documentation: its rate does not count as measured.

    Raises `UsageError` for a receipt of other hardware or of another task, or with values of a wrong type,
    `NotEnoughEvidenceError` if the receipt supports no rate, and `InvalidRunError` if it is invalid or was altered.
    """
    sealed = receipt.load(path)
    try:
        return _read(sealed, hardware, task, digest, slo or Slo())  # type: ignore[call-arg]  # defaults
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path} has values that `inferctl bench` does not write ({what})", "measure again") from None


def _read(
    sealed: receipt.Receipt, hardware: Hardware, task: str, digest: Callable[[], str] | None, slo: Slo
) -> Warned[tuple[Rate, str]]:
    path, data = sealed.path, sealed.data
    key, name = data["hardware"].get("key"), data["hardware"].get("name")
    if key != hardware.key:
        raise UsageError(
            f"{path} was measured on {key or name}, not on {hardware.key}",
            f"measure on {hardware.key}, or set `hardware: {key}` for this flavor",
        )
    if sealed.task != task:
        raise UsageError(f"{path} is of the task {sealed.task}, but the model is for {task}", "use another receipt")
    if sealed.quality.get("passes") is False:
        raise NotEnoughEvidenceError(
            f"{path}: the output was below the quality limits of its plan", "use another precision for this flavor"
        )
    found = capacity.served_rate(sealed)
    if not (found.requests_per_s > 0 and _LOWEST_RATE <= found.tokens_per_s <= _HIGHEST_RATE):
        raise UsageError(f"{path} has a rate of {found.tokens_per_s:g} tokens/s", "measure again")
    if sealed.precision not in get_args(Precision):
        raise UsageError(f"{path} is of a server with the precision {sealed.precision}", "measure an inferctl server")
    sample = bool(data.get("sample"))
    warnings = [f"{path.name}: {caution}" for caution in data["validity"].get("cautions") or ()]
    if not found.within_slo:
        warnings.append(f"{path.name} has no search: its rate is the throughput of a closed loop, without an SLO")
    warnings += [f"{path.name} {problem}" for problem in looser_bounds(data.get("search") or {}, slo, task)]
    known = {sealed.weights_sha256, data["model"].get("original_sha256")} - {None}
    if digest and known and digest() not in known:
        warnings.append(
            f"{path.name} was measured with another model: sha256 {str(sealed.weights_sha256)[:12]}, not "
            f"{digest()[:12]}. Measure this model"
        )
    if sample:
        warnings.append(f"{path.name} is a sample with invented figures: measure before you use the manifests")
    what = "sample receipt" if sample else "receipt"
    when = "invented" if sample else f"measured {str(data['created'])[:10]}"
    limit = "within the SLO" if found.within_slo else "closed loop"
    source = (
        f"{what} {sealed.seal[:_SEAL_DIGITS]} ({when}, {limit}): {shown(found.requests_per_s)} requests/s x "
        f"{shown(found.tokens_per_request)} tokens"
    )
    resources = data.get("resources") or {}
    rate = Rate(
        tokens_per_second=found.tokens_per_s,
        measured=not sample,
        source=source,
        tokens_per_request=found.tokens_per_request,
        load_s=_most([run.get("ready_seconds") for run in sealed.runs]),
        longest_s=_longest(data["summary"]),
        memory_bytes=_whole(resources.get("server_peak_bytes")),
        cores=_most([resources.get("server_cores")]),
        seal=sealed.seal[:_SEAL_DIGITS],
    )
    return Warned((rate, str(sealed.precision)), tuple(warnings))


def looser_bounds(search: Mapping[str, Any], slo: Slo, task: str) -> Iterator[str]:
    """Yield in which way the search of a receipt allowed longer latencies than the SLO of the spec."""
    bounds = search.get("bounds_ms") or {}
    pairs = [("p99", "slo.p99_ms", search.get("slo_p99_ms"), slo.p99_ms)]
    if task == "generate":
        pairs = [
            ("time to the first token", "slo.ttft_ms", bounds.get("ttft"), slo.ttft_ms),
            ("time between tokens", "slo.itl_ms", bounds.get("itl"), slo.itl_ms),
        ]
    for what, setting, measured, wanted in pairs:
        if measured and wanted and measured > wanted:
            yield (
                f"was measured with a {what} of up to {shown(measured)} ms, and {setting} is {shown(wanted)}: its rate "
                "is too high. Search with the SLO of the spec"
            )


def _most(values: list[Any]) -> float | None:
    known = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value) and value > 0]
    return max(known, default=None)


def _whole(value: Any) -> int | None:
    found = _most([value])
    return None if found is None else int(found)


def _longest(summary: Any) -> float | None:
    """Return the longest response in seconds."""
    longest = _most([(summary.get("latency_ms") or {}).get("max")])
    return None if longest is None else longest / 1e3
