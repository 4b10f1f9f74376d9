"""A run with loaded neighbors: the records of one server while other servers on the same device are under load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inferctl.bench.judge import summary
from inferctl.bench.load import records
from inferctl.bench.measure.telemetry import Telemetry

FOLDER = "with-neighbours"
FAILED_LIMIT = 0.05


@dataclass(frozen=True)
class NeighborLoad:
    """What one neighbor completed during a run, and whether it was under load until the end.

    `outlived`: a response came after the run. `failure` says why the load ended early. Without records, the figures
    are None.
    """

    number: int
    outlived: bool
    failure: str | None
    requests_per_s: float | None = None
    failed: int | None = None
    rejected: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return an element of the `others` key of a receipt."""
        figures = ("requests_per_s", "failed", "rejected")
        return {key: value for key, value in asdict(self).items() if value is not None or key not in figures}

    def problem(self, seconds: float) -> str | None:
        """Return why this neighbor did not load the device during a run of `seconds`; None if it did."""
        logs = f"see its logs in neighbour-{self.number}"
        if self.failure or not self.outlived:
            why = self.failure or "no response came after the end of the run"
            return f"did not stay under load ({why}): {logs}"
        failed, rejected = self.failed or 0, self.rejected or 0
        completed = (self.requests_per_s or 0.0) * seconds
        if failed > FAILED_LIMIT * (completed + rejected + failed):
            return f"failed {failed} requests, so it was not under the intended load: {logs}"
        if rejected and not completed:
            return f"rejected all {rejected} requests (429), so it was not under load: lower `users` in the plan"
        return None


@dataclass(frozen=True)
class NeighborRun:
    """One run of a server while `count` neighbors are under load, each in a closed loop of `users`."""

    window: tuple[int, int]
    inputs_per_request: int
    offered: int | None
    serial: int
    state: Mapping[str, Any]
    resources: Mapping[str, int | float]
    telemetry: Telemetry
    others: tuple[NeighborLoad, ...]
    count: int
    users: int

    def records(self, folder: Path) -> summary.RunRecords:
        """Return the records of this run, for the run without load whose records are in `folder`."""
        return summary.RunRecords(records.merge(folder / FOLDER), *self.window, self.inputs_per_request, self.offered)
