"""Run a plan: for each run a server, a warm-up, a load and, the first time, a quality check.

    with `users: auto`:  find the users that saturate each server (`auto_users.py`)
    for each run:        start server ─► warm up ─► measure ─► compare with fp32 (first time) ─► stop

The order alternates (A B C, C B A, ...), so that slow drifts of the machine cancel out. A target that cannot run
becomes an outcome with its failure, and the others continue. All child processes end before `run` returns or raises.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from inferctl.bench.measure import auto_users, closed_loop, profile, quality, retrieval, search
from inferctl.bench.measure.bench import Bench, NotifyProgress, find_tokenizer, phase_notifier, ready_server, reranker
from inferctl.bench.measure.measured_server import MeasuredServer, NotifyPhase
from inferctl.bench.measure.outcome import BenchTarget, Measurement, Outcome
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Run
from inferctl.core.errors import InferctlError


def outcomes(bench: Bench) -> list[Outcome]:
    """Return an outcome without runs for each target, in order, for `run` to fill."""
    return [Outcome(target, planned=bench.plan.repeats) for target in bench.targets]


def run(
    bench: Bench, outcomes: Sequence[Outcome], notify: NotifyProgress, on_measured: Callable[[Outcome], object]
) -> None:
    """Measure all runs, and add them to `outcomes`.

    `on_measured` receives an outcome after each run, so that no result is lost.
    """
    by_name = {outcome.target.name: outcome for outcome in outcomes}
    bench = replace(bench, users=auto_users.find(bench, by_name, notify), tokenizer=find_tokenizer(bench))
    folders: list[tuple[str | None, Path | None]] = [(None, bench.model), *bench.models.items()]
    checkers = {source: quality.QualityChecker(bench.plan.quality, folder) for source, folder in folders}
    order = bench.order
    for number, run in enumerate(order, 1):
        outcome = by_name[run.configuration]
        if outcome.failure:
            continue
        notify_phase = phase_notifier(notify, run.configuration, number, len(order))
        try:
            _measure(bench, outcome, run, checkers[outcome.target.model], notify_phase, _capacity(outcomes))
            if bench.profile and run.repeat == 0 and not outcome.target.url:
                try:
                    outcome.profile = profile.measure(bench, outcome, notify_phase)
                except InferctlError as error:  # the measurement is whole without it
                    notify_phase("profiling the engine", done=f"no profile: {error.message}")
        except InferctlError as error:
            outcome.failure = error.message
        finally:
            if outcome.measurements:
                on_measured(outcome)
    if bench.rerank and bench.collection:
        _rerank(bench, outcomes, phase_notifier(notify, "rerank", len(order), len(order)))


def _measure(
    bench: Bench,
    outcome: Outcome,
    run: Run,
    checker: quality.QualityChecker,
    notify: NotifyPhase,
    capacity_rps: float | None,
) -> None:
    """Measure a run and, after the first one, check the quality."""
    folder = bench.output / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    started_at = time.time()
    with ready_server(bench, outcome.target, folder, notify) as server:
        if bench.plan.search:
            measurement = _measure_search(bench, outcome.target, server, run, folder)
        else:
            measurement = _measure_load(bench, outcome.target, server, run, folder, capacity_rps)
        measurement = replace(measurement, started=started_at, concurrency=bench.users.get(outcome.target.name))
        outcome.measurements.append(measurement)
        notify("measured", done=f"measured: {_brief(measurement)}")
        if run.repeat == 0:
            notify("checking quality")
            outcome.quality = quality.unchecked("the check was interrupted")
            names = bench.load_of(outcome.target).names
            outcome.quality = (
                quality.unchecked("requests use other names: compare each model in a spec of its own")
                if names and (bench.model is None or {*names} != {server.connection.model})
                else checker(server.connection, lambda passed: notify("computing the fp32 reference", passed))
            )
            if bench.collection:
                outcome.retrieval = retrieval.unmeasured(bench.collection, "the measurement was interrupted")
                found = retrieval.measure(
                    server.connection, bench.collection, bench.dimensions, partial(notify, "embedding the collection")
                )
                missing = "no reranking: the benchmark was interrupted" if bench.rerank and found.variants else None
                outcome.retrieval = replace(found, reason=missing or found.reason)
            if server.child:
                server.child.check()
        notify("stopping")


def _rerank(bench: Bench, outcomes: Sequence[Outcome], notify: NotifyPhase) -> None:
    """Add the measures of the best documents of each target, ranked again, after all runs."""
    assert bench.rerank and bench.collection  # the caller reranks only then
    scores: dict[tuple[str, str], float] = {}
    try:
        with reranker(bench, bench.output / "runs" / "rerank", notify) as server:
            for outcome in outcomes:
                if outcome.retrieval and outcome.retrieval.variants:
                    outcome.retrieval = retrieval.reranked(
                        server, bench.collection, outcome.retrieval, scores, lambda passed: notify("reranking", passed)
                    )
    except InferctlError as error:  # the other measures are whole without it
        notify("reranking", done=f"no reranking: {error.message}")
        for outcome in outcomes:
            if outcome.retrieval and outcome.retrieval.variants and outcome.retrieval.reason:
                outcome.retrieval = replace(outcome.retrieval, reason=f"no reranking: {error.message}")


def _measure_load(
    bench: Bench, target: BenchTarget, server: MeasuredServer, run: Run, folder: Path, capacity_rps: float | None
) -> Measurement:
    """Measure a run of one load, after a closed loop if the rate is a share of the capacity."""
    load, corpus = bench.load_of(target), bench.corpus_of(target)
    seed, loop = bench.plan.seed_of(run.repeat), None
    if load.capacity_percent is not None:
        loop = closed_loop.measure(server, load, corpus, seed, run, folder, bench.tokenizer)
        # All targets receive the same rate, so that their latencies can be compared.
        capacity_rps = capacity_rps or loop.summary["requests_per_s"]
        load = load.at(capacity_rps)
    measurement = server.measure(workload.draw(load, corpus, seed, bench.tokenizer), run, folder)
    return replace(measurement, closed_loop=loop, capacity_rps=capacity_rps)


def _capacity(outcomes: Sequence[Outcome]) -> float | None:
    """Return the capacity that the first run of the benchmark measured; None if the rate is not a share of it."""
    runs = (run for outcome in outcomes for run in outcome.measurements)
    return next((run.capacity_rps for run in runs), None)


def _measure_search(bench: Bench, target: BenchTarget, server: MeasuredServer, run: Run, folder: Path) -> Measurement:
    """Search for the highest rate within the SLO."""
    settings, corpus = bench.plan.search, bench.corpus_of(target)
    assert settings is not None  # the caller searches only if the plan has a search
    load = bench.load_of(target)
    bounds = load.generation and load.generation.bounds
    text = workload.read_corpus(corpus)[0][0]
    numbers = itertools.count()

    def request() -> object:
        first = f"{next(numbers)} {secrets.token_hex(4)} {text}"
        return server.connection.request(
            [first, text] if server.connection.task in ("rerank", "generate") else [first], 30
        )

    def measure_load(work: workload.Workload, place: Path) -> Measurement:
        # The folder of a probe has a name such as 03-bisect-48.5.
        label = place.name.partition("-")[2].replace("-", " ")
        return server.labeled(f"{label}, {{phase}}").measure(work, run, place)

    idle_s = min(search.wait_until_idle(request, 0, None) for _ in range(5))
    return search.Searcher(
        settings=settings,
        slo_p99_ms=100.0 if bounds else settings.required_slo_ms(bench.slo_p99_ms),
        load=load,
        tokenizer=bench.tokenizer,
        corpus=corpus,
        seed=bench.plan.seed,
        folder=folder,
        measure_load=measure_load,
        wait_until_idle=lambda timeout_s: search.wait_until_idle(request, timeout_s, idle_s),
        budget=bench.plan.error_budget_percent / 100,
        seconds=bench.search_s,
        on_probe=lambda probe: server.notify("search", done=f"{probe.stage} {probe.rate:g} requests/s: {probe.reason}"),
    ).run()


def _brief(measurement: Measurement) -> str:
    """Return one line on a run that has ended."""
    found = measurement.summary
    rate, label, latency = f"{found['requests_per_s']:.1f} req/s", "", found["latency_ms"]
    if "ttft_ms" in found:
        rate, label, latency = f"{found['output_tokens_per_s']:.1f} tok/s", "TTFT ", found["ttft_ms"]
    figures = [f"{key} {latency[key]['value']:.1f}" for key in ("p50", "p99") if latency[key]["value"] is not None]
    return rate + (f", {label}{' '.join(figures)} ms" if figures else "")
