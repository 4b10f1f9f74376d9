"""Receipts whose runs have given figures, for the tests of the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_samples import document

from inferctl.receipts import receipt

_PERCENTILES = {"p50": (1.0, 6), "p90": (1.5, 36), "p99": (2.2, 368)}


def run_values(
    center_ms: float, factors: Sequence[float], *, n: int = 1000, memory: float = 500
) -> list[dict[str, float]]:
    """The figures of one run per factor: latencies are `factor` times as long and the rate is lower by it.

    `center_ms` is the median at a factor of 1, `memory` in MiB.
    """
    return [
        {key: center_ms * factor * shape for key, (shape, _) in _PERCENTILES.items()}
        | {"rate": 4000 / (center_ms * factor), "n": n, "memory": memory * (1 + 1e-4 * place)}
        for place, factor in enumerate(factors)
    ]


def run(values: dict[str, float], repeat: int, minute: int) -> dict[str, Any]:
    """A run of a receipt with the keys that the verdict reads."""
    n = int(values["n"])
    latency = {
        key: {"value": values[key] if n >= needed else None, "needed": needed}
        for key, (_, needed) in _PERCENTILES.items()
    }
    return {
        "repeat": repeat,
        "started": f"2026-01-02T{minute // 60:02}:{minute % 60:02}:00.000+00:00",
        "summary": {"seconds": 2.0, "requests_per_s": values["rate"], "latency_ms": {"n": n, **latency}},
        "resources": {"server_peak_bytes": values["memory"] * 2**20},
    }


def runs(values: Sequence[dict[str, float]], first: bool, apart: bool = False) -> list[dict[str, Any]]:
    """Runs, one per minute: interleaved (A B, B A, ...), or `apart`: A A B B. `first` selects A."""
    minutes = [
        (0 if first else len(values)) + repeat if apart else 2 * repeat + int((repeat % 2 == 0) != first)
        for repeat in range(len(values))
    ]
    return [run(one, repeat, minute) for repeat, (one, minute) in enumerate(zip(values, minutes, strict=True))]


def receipts_of(
    folder: Path,
    old: Sequence[dict[str, float]],
    new: Sequence[dict[str, float]],
    *,
    apart: bool = False,
    names: tuple[str, str] = ("old", "new"),
) -> tuple[receipt.Receipt, receipt.Receipt]:
    """Two sealed receipts of the same work on the same machine."""
    made = []
    for name, values, first in zip(names, (old, new), (True, False), strict=True):
        data = document(name, 100, 10)
        data["precision"]["effective"] = "bf16"
        data["plan"] = {"name": "quick", "load": {"mode": "closed", "users": 4}}
        data["environment"] = {"cores": 2}
        data["runs"] = runs(values, first, apart)
        made.append(receipt.write(folder / "receipts" / f"{name}.json", data))
    return made[0], made[1]
