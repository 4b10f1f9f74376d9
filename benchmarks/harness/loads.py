"""What the scripts here share: one load on one server, and where their figures go."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from inferctl.bench.judge import summary, validity
from inferctl.bench.load import generator, procfs, target
from inferctl.bench.plan import plan, workload

SERIAL = 100_000


def measure(
    url: str, corpus: str = "short", seed: int = 1, **settings: Any
) -> tuple[generator.LoadResult, summary.RunRecords]:
    """Put a load with these keys on `url`; records on this machine's clock, and the part that was measured."""
    wanted = plan.Load.model_validate(settings)
    work = workload.draw(wanted, corpus, seed)
    with tempfile.TemporaryDirectory(prefix="inferctl-harness-") as folder:
        description = generator.prepare(wanted, work, target.connect(url), SERIAL, Path(folder))
        done = generator.run(wanted, description, lambda live: None, lambda: None)
    offered = len(work.schedule_ns) if wanted.mode == "open" else None
    part = summary.RunRecords(done.rows, done.state["measure_start_ns"], done.state["measure_end_ns"], 1, offered)
    return done, part


def judged(done: generator.LoadResult, part: summary.RunRecords) -> validity.Validity:
    """What `inferctl bench` would say of this run's validity, but for other processes on the machine."""
    client = summary.client_cpu_percent(done.state)
    resources = {} if client is None else {"client_cpu_percent": client}
    return validity.judge(summary.summarize([part]), resources, done.state, procfs.cores())


def write(path: Path | None, document: dict[str, Any]) -> None:
    """The figures as JSON, when a file was asked for."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
