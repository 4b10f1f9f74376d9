"""The benchmark targets, the measurement of each run, and the outcome of each target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferctl.bench.judge import summary, validity
from inferctl.bench.judge.summary_types import Summary
from inferctl.bench.judge.validity import Validity
from inferctl.bench.measure import telemetry
from inferctl.bench.measure.concurrency import Concurrency
from inferctl.bench.measure.quality import QualityResult, unchecked
from inferctl.bench.measure.retrieval import RetrievalResult
from inferctl.bench.measure.telemetry import Telemetry
from inferctl.bench.plan.plan import Run
from inferctl.bench.plan.shape import Load


@dataclass(frozen=True)
class BenchTarget:
    """A benchmark target: a server that inferctl starts, or the `url` of a running one.

    inferctl starts a server in `precision` with `max_batch_tokens`, of the model or of its prepared `checkpoint` (a
    folder). `model` is its source, if the benchmark has several. `corpus` and the keys of `load` replace the plan's.
    """

    name: str
    precision: str | None = None
    url: str | None = None
    max_batch_tokens: int | None = None
    corpus: str | None = None
    load: Mapping[str, Any] | None = None
    checkpoint: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class WorkloadRecord:
    """The requests that one run sent, so that two runs can be shown to have done the same work.

    `sha256` is the digest of the workload, `corpus` the name of the corpus without its folder. `approximate` is why
    prompts of generation did not have exactly the lengths of the plan; None if they had.
    """

    sha256: str | None = None
    corpus: str | None = None
    corpus_sha256: str | None = None
    seed: int | None = None
    inputs: str | None = None
    approximate: str | None = None


@dataclass(frozen=True)
class Measurement:
    """One load that was sent to a server: a complete run, or a part of one.

    - `started`: seconds since the epoch.
    - `state`: the load generator's report on the load.
    - `resources`: cores and memory of the processes, in the measured window.
    - `info`: `GET /info` of the server.
    - `serial`: the cache-busting prefix of the first input.
    - `load`: the load that was sent.
    - `pace`: the server's batch latency model at the end of the run; None if it reports none.
    - `search`: the result of a search for the highest rate. The measurement is then that of its best probe.
    - `pooled`: the earlier measurements of that probe.
    - `closed_loop`: the closed loop before this load, if the rate is a share of the capacity `capacity_rps`.
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
    pooled: Sequence[Measurement] = ()
    closed_loop: Measurement | None = None
    capacity_rps: float | None = None
    concurrency: Concurrency | None = None

    @property
    def all_records(self) -> list[summary.RunRecords]:
        """Return the records of this run, after those that a search pooled with it."""
        return [*(earlier.records for earlier in self.pooled), self.records]

    @property
    def summary(self) -> Summary:
        """The figures of this load alone."""
        return summary.summarize([self.records])

    def validity_on(self, cores: int) -> Validity:
        """Return the validity of this load by its figures and by the state of a machine with `cores` cores."""
        searched = self.search is not None
        found = validity.judge(self.summary, self.resources, self.state, cores, searched)
        front_end = validity.judge_front_end(self.resources, self.info)
        return validity.merge(found, telemetry.gpu_validity(self.telemetry), front_end)


@dataclass
class Outcome:
    """All that a benchmark measured of one target.

    `retrieval` and `profile` (of its engine) are there if they were requested. `failure` says in one line why there are
    fewer runs than `planned`; None if the benchmark was interrupted.
    """

    target: BenchTarget
    measurements: list[Measurement] = field(default_factory=list)
    quality: QualityResult = field(default_factory=lambda: unchecked("no run reached the check"))
    retrieval: RetrievalResult | None = None
    profile: Mapping[str, Any] | None = None
    failure: str | None = None
    planned: int = 1

    @property
    def info(self) -> Mapping[str, Any]:
        """`GET /info` of the first run. `judgment.judge_outcome` compares the other runs with it."""
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
