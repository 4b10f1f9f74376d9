"""The result of a benchmark: the content of the table, of the report and of `--json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferctl.bench.measure.bench import Bench
from inferctl.bench.measure.environment import Environment
from inferctl.bench.measure.outcome import Outcome
from inferctl.bench.plan.plan import Plan
from inferctl.bench.plan.shape import Load
from inferctl.bench.report import findings, retrieval, rows, search_findings
from inferctl.bench.report.caveats import Caveat, caveats
from inferctl.bench.report.receipts import load_without_folder
from inferctl.bench.report.retrieval import RetrievalRow
from inferctl.bench.report.rows import Row
from inferctl.core.errors import InferctlError, InvalidRunError
from inferctl.facts import catalog
from inferctl.receipts.receipt import Receipt

SCHEMA = "inferctl.bench/1"


@dataclass(frozen=True)
class Result:
    """The result of a benchmark. The first finding is the most important one."""

    plan: str
    load: Load
    repeats: int
    findings: Sequence[str]
    caveats: Sequence[Caveat]
    rows: Sequence[Row]
    environment: Environment
    output: str
    report: str
    retrieval: Sequence[RetrievalRow] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the document of `--json` and `result.json` (docs/receipts.md describes each key)."""
        return {
            "schema": SCHEMA,
            "plan": self.plan,
            "load": load_without_folder(self.load),
            "repeats": self.repeats,
            "finding": self.findings[0],
            "findings": list(self.findings),
            "caveats": [dataclasses.asdict(caveat) for caveat in self.caveats],
            "rows": [row.as_dict() for row in self.rows],
            "retrieval": [row.as_dict() for row in self.retrieval],
            "environment": self.environment.as_dict(),
            "output": self.output,
            "report": self.report,
        }


def collect(bench: Bench, outcomes: Sequence[Outcome], receipts: Sequence[Receipt], report: Path) -> Result:
    """Return the result of all outcomes and their receipts; `report` is the path of the HTML file."""
    plan = _with_found_users(bench.plan, outcomes)
    by_name = {receipt.name: receipt for receipt in receipts}
    measured = [rows.of_outcome(outcome, by_name.get(outcome.target.name), bench.slo_p99_ms) for outcome in outcomes]
    every = [*measured, *other_hardware(bench, measured)]
    found = retrieval.rows(receipts)
    return Result(
        plan=plan.name,
        load=plan.load,
        repeats=plan.repeats,
        findings=retrieval.sentences(found, receipts) + findings.describe(every, plan.error_budget_percent),
        caveats=caveats(every),
        rows=every,
        environment=bench.environment,
        output=str(bench.output),
        report=str(report),
        retrieval=found,
    )


def _with_found_users(plan: Plan, outcomes: Sequence[Outcome]) -> Plan:
    """Return the plan with the number of users that was found, for `users: auto`."""
    runs = (run for outcome in outcomes for run in outcome.measurements)
    found = next((run.concurrency for run in runs if run.concurrency), None)
    if not found or not plan.load.auto_users:
        return plan
    return plan.model_copy(update={"load": plan.load.model_copy(update={"users": found.users})})


def write(path: Path, result: Result) -> None:
    """Write `result.json`."""
    path.write_text(json.dumps(result.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def other_hardware(bench: Bench, measured: Sequence[Row]) -> list[Row]:
    """Return rows for the requested hardware that no measured row ran on.

    A GPU of this machine that no server used was not measured.
    """
    used = [row.hardware for row in measured if row.hardware]
    names = ", ".join(dict.fromkeys(hardware["name"] for hardware in used))
    reason = f"the hardware measured is {names}" if names else "nothing was measured"
    profiles = catalog.hardware_profiles()
    return [
        Row(key, rows.NOT_MEASURED_HERE, reason, hardware={"key": key, "name": getattr(profiles.get(key), "name", key)})
        for key in bench.hardware_wanted
        if key not in {hardware["key"] for hardware in used}
    ]


def problem(result: Result) -> InferctlError | None:
    """Return the error with which a benchmark ends; None if it measured valid results.

    It is an error if nothing was measured, if a measured row is invalid, or if no search has a result.
    """
    requested = [row for row in result.rows if row.outcome != rows.NOT_MEASURED_HERE]
    measured = [row for row in requested if row.receipt]
    if not measured:
        reasons = "; ".join(f"{row.configuration}: {row.reason}" for row in requested)
        return InferctlError(f"nothing could be measured ({reasons})", f"see the server logs in {result.output}/runs")
    invalid = [row for row in measured if not row.valid]
    if invalid:
        reasons = "; ".join(f"{row.configuration}: {row.reasons[0]}" for row in invalid)
        which = (
            "the run is" if len(invalid) == len(measured) else f"{len(invalid)} of {len(measured)} configurations are"
        )
        return InvalidRunError(f"{which} invalid ({reasons})", "fix the cause and measure again")
    return search_findings.inconclusive([row.as_dict() for row in measured])
