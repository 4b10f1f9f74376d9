"""Shell completion: the values of options and arguments. A list is read only if a shell requests it."""

from __future__ import annotations

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


def _hardware() -> Iterable[str]:
    from inferctl.facts import catalog

    return catalog.hardware_profiles()


def _bases() -> Iterable[str]:
    from inferctl.facts import catalog

    return catalog.bases()


def _stacks() -> Iterable[str]:
    from inferctl.facts import catalog

    return catalog.stacks()


def _plans() -> Iterable[str]:
    from inferctl.bench.plan import plan

    return plan.names()


def _corpora() -> Iterable[str]:
    from inferctl.core import assets

    return sorted(file.stem for file in (assets.root() / "benchmarks" / "corpora").glob("*.jsonl"))


def _metrics() -> Iterable[str]:
    from inferctl.bench.judge import run_metrics

    return [*run_metrics.METRICS, run_metrics.REJECTED]


HARDWARE, BASES, STACKS = _offer(_hardware), _offer(_bases), _offer(_stacks)
HARDWARE_OR_ALL = _offer(lambda: ["all", *_hardware()])
PLANS, CORPORA, METRICS = _offer(_plans), _offer(_corpora), _offer(_metrics)
PRECISIONS = one_of("auto", "fp32", "fp16", "bf16", "int8", "fp8")
PLATFORMS = one_of("linux/amd64", "linux/arm64")
