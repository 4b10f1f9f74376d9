"""The validity of the runs of one target, of each run and of all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inferctl.bench.judge import summary, validity
from inferctl.bench.judge.summary_types import Summary
from inferctl.bench.judge.validity import Validity
from inferctl.bench.measure import closed_loop
from inferctl.bench.measure.outcome import Outcome, WorkloadRecord


@dataclass(frozen=True)
class JudgedOutcome:
    """The summary of all runs of a target, the validity of each run, and the validity of all together."""

    summary: Summary
    runs: list[Validity]
    validity: Validity


def judge_outcome(outcome: Outcome, cores: int, budget_percent: float) -> JudgedOutcome:
    """Return the pooled summary and the validity of an outcome that has at least one run.

    `cores` is the number of cores of the machine, `budget_percent` the share of requests that may fail.
    """
    runs = outcome.measurements
    searched = any(run.search is not None for run in runs)
    each = [
        validity.merge(run.validity_on(cores), run.closed_loop.validity_on(cores).labeled("closed loop"))
        if run.closed_loop
        else run.validity_on(cores)
        for run in runs
    ]
    pooled = summary.summarize([part for run in runs for part in run.all_records])
    found = validity.combine(each, pooled, budget_percent, searched=searched)
    load = runs[0].load
    if load and load.generation:
        unique = load.inputs == "unique"
        approximate = next((run.workload.approximate for run in runs if run.workload.approximate), None)
        judged = validity.judge_generation(pooled, load.generation.common_prefix, unique, approximate)
        found = validity.merge(found, judged)
    if closed := closed_loop.pooled(runs):
        found = validity.merge(found, validity.judge_requests(closed["summary"], budget_percent).labeled("closed loop"))
    reasons = [*found.reasons, *validity.judge_identity([run.info for run in runs]).reasons]
    cautions = list(found.cautions)
    if _workload_changed([run.workload for run in runs]):
        reasons.append("the runs differ in what was sent, because a corpus changed: measure again")
    if outcome.failure:
        reasons.append(outcome.failure)
    if outcome.interrupted:
        cautions.insert(0, f"{outcome.interrupted}: run the benchmark again for the others")
    return JudgedOutcome(pooled, each, Validity(tuple(reasons), tuple(cautions)))


def _workload_changed(workloads: Sequence[WorkloadRecord]) -> bool:
    """Return whether a corpus changed between runs: one seed has two digests, or one corpus has two."""
    digests = {(work.seed, work.sha256) for work in workloads}
    corpora = {work.corpus_sha256 for work in workloads}
    return len(digests) > len({seed for seed, _ in digests}) or len(corpora) > 1
