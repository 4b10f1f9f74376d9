"""Functions that the scripts in this folder share: options, measure one load on one server, and write figures."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from inferctl.bench.judge import summary, validity
from inferctl.bench.load import load_run, target
from inferctl.bench.plan import plan, workload
from inferctl.core import cgroup

SERIAL = 100_000


def options(description: str | None, **defaults: Any) -> argparse.Namespace:
    """Return the options of a script: one for each default, of its type or with a list of its type, and `--json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        one, count = (default[0], "*") if isinstance(default, list) else (default, None)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(one), nargs=count, default=default)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(
    url: str, corpus: str = "short", seed: int = 1, task: str = "embed", **settings: Any
) -> tuple[load_run.LoadResult, summary.RunRecords]:
    """Measure a load with these keys on `url`. Return all records, on this machine's clock, and the measured part."""
    load = plan.Plan.model_validate({"name": "harness", "load": settings}).for_task(task).load
    work = workload.draw(load, corpus, seed)
    with tempfile.TemporaryDirectory(prefix="inferctl-harness-") as folder:
        description = load_run.prepare(load, work, target.connect(url), SERIAL, Path(folder))
        result = load_run.run(load, description, lambda progress: None, lambda: None)
    offered = len(work.schedule_ns) if load.mode == "open" else None
    window = (result.state["measure_start_ns"], result.state["measure_end_ns"])
    bounds = load.generation.bounds if load.generation else {}
    part = summary.RunRecords(result.rows, *window, 1, offered, result.events, bounds)
    return result, part


def judge(result: load_run.LoadResult, part: summary.RunRecords) -> validity.Validity:
    """Return the validity of a run as `inferctl bench` has it, without the check for other processes of the machine."""
    client = summary.client_cpu_percent(result.state)
    resources = {} if client is None else {"client_cpu_percent": client}
    return validity.judge(summary.summarize([part]), resources, result.state, cgroup.cores())


def write(path: Path | None, document: dict[str, Any]) -> None:
    """Write the figures as JSON if `path` is given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
