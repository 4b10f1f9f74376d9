"""Shell completion: the values of options and arguments. A list is read only if a shell requests it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable

from inferctl.core.errors import InferctlError

Callback = Callable[[str], list[str]] | None


def _offer(names: Callable[[], Iterable[str]]) -> Callback:
    """Return a callback for Typer; None without a completion request, as Typer inspects callbacks at each start."""
    if "_INFERCTL_COMPLETE" not in os.environ:
        return None

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        try:
            return [f"{before}{comma}{name}" for name in names() if name.startswith(last)]
        except InferctlError:
            # A shell cannot show an error, only values.
            return []

    return complete


def one_of(*names: str) -> Callback:
    """Return a callback that offers these words."""
    return _offer(lambda: names)


def _listed(module: str, name: str) -> Callable[[], Iterable[str]]:
    """Return a function that calls `name()` of a module of this package, which it imports then."""
    return lambda: getattr(importlib.import_module(f"inferctl.{module}"), name)()


def _corpora() -> Iterable[str]:
    from inferctl.core import assets

    return sorted(file.stem for file in (assets.root() / "benchmarks" / "corpora").glob("*.jsonl"))


def _metrics() -> Iterable[str]:
    from inferctl.bench.judge import retrieval, run_metrics

    return [*run_metrics.METRICS, run_metrics.REJECTED, retrieval.NAME]


_hardware = _listed("facts.catalog", "hardware_profiles")
HARDWARE, HARDWARE_OR_ALL = _offer(_hardware), _offer(lambda: ["all", *_hardware()])
BASES, STACKS = _offer(_listed("facts.catalog", "bases")), _offer(_listed("facts.catalog", "stacks"))
PLANS, CORPORA, METRICS = _offer(_listed("bench.plan.plan", "names")), _offer(_corpora), _offer(_metrics)
PRECISIONS = one_of("auto", "fp32", "fp16", "bf16", "int8", "fp8")
PLATFORMS = one_of("linux/amd64", "linux/arm64")
