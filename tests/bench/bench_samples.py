"""Build records, results and receipts for the tests of the benchmark."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from inferctl.bench.judge import summary
from inferctl.bench.load import records
from inferctl.bench.load.records import MEASURED, OK, WARMUP
from inferctl.bench.loadgen import recorder
from inferctl.bench.measure import runner
from inferctl.bench.measure.bench import Bench, Progress
from inferctl.bench.measure.environment import Environment
from inferctl.bench.measure.outcome import BenchTarget, Outcome
from inferctl.bench.plan import plan as plans
from inferctl.bench.plan.plan import Plan
from inferctl.bench.report import result, terminal
from inferctl.bench.report.receipts import write_all
from inferctl.bench.report.result import Result
from inferctl.receipts import receipt

FIELDS = [(name, kind) for name, kind, _ in recorder.FIELDS]
SECOND = 1_000_000_000
MACHINE = Environment(
    "cpu", "Test CPU", "Test CPU", ("avx2",), 2, 2, 8 * 10**9, (), "Linux 6", "3.11", {"torch": "2"}, {}, 0.5
)
ANSWERING = Path(__file__).with_name("answering.py")
SHORT_PLAN = str(Path(__file__).with_name("short.yaml"))
SHORT = {"mode": "closed", "users": 2, "duration_s": 1, "warmup_s": 0, "timeout_s": 5}
HARNESS = Path(__file__).resolve().parents[2] / "benchmarks" / "harness"


def bench(
    folder: Path,
    *names: str,
    options: Sequence[str] | Callable[[str, Path], Sequence[str]] = (),
    model: Path | None = None,
    **changes: Any,
) -> Bench:
    """Return a benchmark of the answering server, with a configuration for each precision in `names`.

    `options`: those of the server, also by precision and by the file in which it announces itself. `changes`: other
    values in the plan.
    """
    plan = {
        "name": "test",
        "configurations": [{"name": name, "precision": name} for name in names],
        "load": SHORT,
        "corpus": "short",
        "quality": None,
        **changes,
    }

    def command(precision: str, announce: Path, checkpoint: str | None) -> list[str]:
        more = options(precision, announce) if callable(options) else options
        return [sys.executable, str(ANSWERING), "--announce", str(announce), "--precision", precision, *more]

    return Bench(Plan.model_validate(plan), [BenchTarget(name, name) for name in names], command, model, folder)


def ran(
    work: Bench,
    notify: Callable[[Progress], None] = lambda progress: None,
    on_measured: Callable[[Outcome], object] = lambda outcome: None,
) -> list[Outcome]:
    outcomes = runner.outcomes(work)
    runner.run(work, outcomes, notify, on_measured)
    return outcomes


def collected(work: Bench, outcomes: list[Outcome]) -> Result:
    return result.collect(work, outcomes, write_all(work, outcomes), work.output / "report.html")


def row(
    start_ms: float, latency_ms: float, *, late_ms: float = 0, phase: int = MEASURED, error: int = OK, tokens: int = 10
) -> tuple[Any, ...]:
    """Return a record of a request due at `start_ms`, sent `late_ms` later, complete `latency_ms` after `start_ms`."""
    start, sent, end = (int(ms * 1e6) for ms in (start_ms, start_ms + late_ms, start_ms + latency_ms))
    return (start, sent, end, end, 0, 100, tokens, 1.0, float("nan"), 2.0, 200 if error == OK else 500, phase, error, 0)


def table(*rows: tuple[Any, ...]) -> records.Rows:
    return np.array(list(rows), dtype=np.dtype(FIELDS))


def steady(rate: float, latency_ms: float, seconds: int = 10, jitter: float = 0.2) -> summary.RunRecords:
    """Return a run of evenly spaced requests, with latencies spread evenly by `jitter` around `latency_ms`."""
    count = int(rate * seconds)
    rows = [
        row(1000 / rate * i, latency_ms * (1 - jitter + 2 * jitter * ((i * 7) % count) / count)) for i in range(count)
    ]
    warm = row(0, 9999, phase=WARMUP)
    return summary.RunRecords(table(warm, *rows), 0, seconds * SECOND, 1)


def document(name: str, rate: float, latency_ms: float, level: str = "native", **changes: Any) -> dict[str, Any]:
    """Return the document of a receipt for `steady(rate, latency_ms)`."""
    part = steady(rate, latency_ms)
    made: dict[str, Any] = {
        "created": "2026-01-02T03:04:05+00:00",
        "inferctl": "0",
        "configuration": {"name": name, "precision": name, "url": None, "this_machine": True},
        "plan": {"name": "quick", "load": {"mode": "closed", "users": 8, "arrivals": "poisson"}},
        "slo": {"p99_ms": None},
        "workload": {"sha256": "ab" * 32, "corpus": "short", "corpus_sha256": "cd" * 32, "seed": 1, "inputs": "unique"},
        "model": {"source": "models/test", "sha256": "ef" * 32},
        "precision": {
            "effective": name,
            "level": level,
            "reason": f"the reason of {name}",
            "method": "torch",
            "requested": name,
        },
        "hardware": {"key": "cpu", "name": "Test CPU", "kind": "cpu", "detected_by": "server"},
        "environment": {},
        "server": {},
        "image": None,
        "summary": summary.summarize([part]),
        "resources": {"client_cpu_percent": 20.0, "server_peak_bytes": 5e8 if name != "int8" else 4e8},
        "quality": {
            "checked": True,
            "texts": 100,
            "cosine": {"mean": 0.99991, "p1": 0.9991, "min": 0.9989},
            "recall_at_10": 0.987,
            "limits": {"cosine_p1": 0.98, "recall_at_10": 0.9},
            "passes": True,
        },
        "validity": {"valid": True, "reasons": [], "cautions": []},
        **summary.curves([part]),
        "runs": [{"repeat": 0, "timeline": summary.timeline(part), "records": []}],
    }
    return made | changes


def open_loop(made: dict[str, Any], rate: float) -> dict[str, Any]:
    """Return the document of a receipt as one of an open loop of `rate` requests/s."""
    offered = {"offered": made["summary"]["requests"], "requested_per_s": rate}
    load = {"mode": "open", "rate": rate, "arrivals": "poisson"}
    return made | {"plan": {"name": "quick", "load": load}, "summary": {**made["summary"], **offered}}


def sealed(folder: Path, *documents: dict[str, Any]) -> list[receipt.Receipt]:
    return [receipt.write(folder / "receipts" / f"{one['configuration']['name']}.json", one) for one in documents]


def records_file(path: Path, rows: records.Rows) -> Path:
    """Write rows to a file in the format of the load generator, and return the file."""
    header = {"fields": FIELDS, "worker": 0}
    path.write_bytes(records.MAGIC + json.dumps(header).encode() + b"\n" + rows.tobytes())
    return path


def shown(
    folder: Path,
    *documents: dict[str, Any],
    failed: Sequence[str] = (),
    rate: float | None = None,
    machine: Environment = MACHINE,
    hardware: Sequence[str] = (),
) -> tuple[Result, list[receipt.Receipt]]:
    """Return the result of a benchmark with these receipts, and the receipts. `failed`: other targets."""
    receipts = sealed(folder, *(open_loop(one, rate) if rate else one for one in documents))
    outcomes = [Outcome(BenchTarget(one.name, one.name)) for one in receipts]
    outcomes += [Outcome(BenchTarget(name, name), failure="bitsandbytes is not installed") for name in failed]
    wanted = plans.read_plan("quick").with_overrides(rate=rate)
    work = Bench(wanted, [], None, None, folder, 20.0, environment=machine, hardware_wanted=hardware)
    return result.collect(work, outcomes, receipts, folder / "report.html"), receipts


def text_of(found: Result, width: int = 80) -> str:
    """Return what a terminal shows of a result."""
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(terminal.render(found))
    assert max(map(len, stream.getvalue().splitlines())) <= width
    return stream.getvalue()
