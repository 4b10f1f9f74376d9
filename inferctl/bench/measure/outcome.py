"""The benchmark targets, the measurement of each run, and the outcome of each target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferctl.bench import privacy
from inferctl.bench.judge import summary
from inferctl.bench.load import generator
from inferctl.bench.measure.concurrency import Concurrency
from inferctl.bench.measure.neighbor_run import NeighborRun
from inferctl.bench.measure.quality import QualityResult, unchecked
from inferctl.bench.measure.telemetry import Telemetry
from inferctl.bench.plan.plan import Load, Run
from inferctl.bench.plan.workload import Workload

CLOSED_LOOP_FOLDER = "closed-loop"


@dataclass(frozen=True)
class BenchTarget:
    """A benchmark target: a server that inferctl starts, or the `url` of a running one.

    inferctl starts a server in `precision` with `max_batch_tokens`. `corpus` and the keys of `load` replace the plan's.
    """

    name: str
    precision: str | None = None
    url: str | None = None
    max_batch_tokens: int | None = None
    corpus: str | None = None
    load: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class WorkloadRecord:
    """The requests that one run sent, so that two runs can be shown to have done the same work.

    `sha256` is the digest of the workload, `corpus` the name of the corpus without its folder.
    """

    sha256: str | None = None
    corpus: str | None = None
    corpus_sha256: str | None = None
    seed: int | None = None
    inputs: str | None = None


def workload_record(work: Workload, load: Load, corpus: str, seed: int) -> WorkloadRecord:
    """Return the record of a workload that was drawn from `load`, `corpus` and `seed`."""
    return WorkloadRecord(work.digest, privacy.name_of(corpus), work.corpus_sha256, seed, load.inputs)


@dataclass(frozen=True)
class ClosedLoop:
    """The closed loop of one run. `reference_rps` is the capacity that the rate of the open loops is a share of."""

    users: int
    requests_per_s: float
    window: tuple[int, int]
    inputs_per_request: int
    serial: int
    state: Mapping[str, Any]
    resources: Mapping[str, int | float]
    telemetry: Telemetry
    reference_rps: float

    def records(self, folder: Path) -> summary.RunRecords:
        """Return the records of this loop, for the run whose records are in `folder`."""
        rows = generator.read_records(folder / CLOSED_LOOP_FOLDER, self.state)
        return summary.RunRecords(rows, *self.window, self.inputs_per_request)


@dataclass(frozen=True)
class PooledMeasurement:
    """The records of an earlier measurement that a search pooled with a later one of the same rate."""

    records: summary.RunRecords
    state: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class Measurement:
    """One complete run.

    - `started`: seconds since the epoch.
    - `state`: the load generator's report on the run.
    - `resources`: cores and memory of the processes, in the measured window.
    - `info`: `GET /info` of the server.
    - `serial`: the cache-busting prefix of the first input.
    - `load`: the load that was sent to this target.
    - `pace`: the server's batch latency model at the end of the run; None if it reports none.
    - `search`: the result of a search for the highest rate. The measurement is then that of its best probe.
    - `pooled`: the earlier measurements of that probe.
    - `with_neighbors`: the same run with loaded neighbors.
    - `closed_loop`: the closed loop before this run, if the rate is a share of the capacity.
    - `concurrency`: how the number of users was found, for `users: auto`.
    """

    run: Run
    started: float
    records: summary.RunRecords
    state: Mapping[str, Any]
    resources: Mapping[str, float]
    folder: Path
    info: Mapping[str, Any]
    serial: int
    telemetry: Telemetry = field(default_factory=Telemetry)
    load: Load | None = None
    workload: WorkloadRecord = field(default_factory=WorkloadRecord)
    pace: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    pooled: Sequence[PooledMeasurement] = ()
    with_neighbors: NeighborRun | None = None
    closed_loop: ClosedLoop | None = None
    concurrency: Concurrency | None = None

    @property
    def all_records(self) -> list[summary.RunRecords]:
        """Return the records of this run, after those that a search pooled with it."""
        return [*(earlier.records for earlier in self.pooled), self.records]


@dataclass
class Outcome:
    """All that a benchmark measured of one target.

    `failure` says in one line why there are fewer runs than `planned`; None if the benchmark was interrupted.
    `check_done` is True if the quality check needs no second attempt. A check that was interrupted, or that had no
    reference, needs one.
    """

    target: BenchTarget
    measurements: list[Measurement] = field(default_factory=list)
    quality: QualityResult = field(default_factory=lambda: unchecked("no run reached the check"))
    failure: str | None = None
    planned: int = 1
    check_done: bool = False

    @property
    def info(self) -> Mapping[str, Any]:
        """`GET /info` of the first run. `judge` compares the other runs with it."""
        return self.measurements[0].info if self.measurements else {}

    @property
    def interrupted(self) -> str | None:
        """How many runs were complete when the benchmark was interrupted; None if it was not, or if it failed."""
        done = len(self.measurements)
        return (
            None
            if self.failure or done >= self.planned
            else f"interrupted after {done} of {self.planned} run{'s' if self.planned > 1 else ''}"
        )

    def has(self, run: Run) -> bool:
        """Return whether this run is complete."""
        return any(measurement.run == run for measurement in self.measurements)
