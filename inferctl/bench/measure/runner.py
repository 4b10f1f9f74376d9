"""Runs a plan: a server per run, warm-up, load, quality, in an order that lets slow drifts of the machine cancel out.

    where the plan says `users: auto`:   find the users that saturate each server (`concurrency.py`)
    for each run (A B C D, D C B A, …):  start server ─► warm up ─► measure ─► compare with fp32 (first time) ─► stop server
    for each configuration, each time:   pool its runs ─► judge ─► receipt

A configuration that cannot run becomes an outcome with its reason and the others go on. Whatever ends this, no child process is left.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inferctl.bench.judge import summary, validity
from inferctl.bench.load import child_server, generator, target
from inferctl.bench.measure import concurrency, neighbors, quality, resume, search, telemetry, throughput
from inferctl.bench.measure.outcome import Measurement, Outcome, Subject
from inferctl.bench.measure.session import Session, Tell, describe
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Load, Plan, Run
from inferctl.errors import InferctlError, UsageError

__all__ = ["Bench", "Measurement", "Outcome", "Progress", "Subject", "judge", "outcomes", "run"]


@dataclass(frozen=True)
class Progress:
    """What is happening now. `number` of `total` runs; `seconds` in this phase; `live` while a load runs; `done` what has just ended, in a line."""

    name: str
    number: int
    total: int
    phase: str
    seconds: float = 0.0
    live: generator.LoadProgress | None = None
    done: str | None = None


CONCURRENCY = "concurrency.json"
Notify = Callable[[Progress], None]


@dataclass(frozen=True)
class Bench:
    """What `run` needs: the plan, its subjects, how to start a server, the model folder for the quality check, and where to write.

    `model` may be None when only running servers are measured; their vectors are then not checked. `slo_p99_ms` is what a search
    looks for where the plan does not say it. `slices` are the MIG devices that a server and its neighbours are spread over.
    `access` is what requests to running servers need. `users` has what was found for each subject with `users: auto`.
    """

    plan: Plan
    subjects: Sequence[Subject]
    command: child_server.ServeCommand | None
    model: Path | None
    output: Path
    slo_p99_ms: float | None = None
    slices: Sequence[str] = ()
    access: target.Access = field(default_factory=target.Access)
    users: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def order(self) -> list[Run]:
        """Every run, in its order."""
        return self.plan.runs([subject.name for subject in self.subjects])

    def load_of(self, subject: Subject) -> Load:
        load = self.plan.load_with(subject.load)
        found = self.users.get(subject.name)
        return load.model_copy(update={"users": found["users"]}) if found and load.auto_users else load

    @property
    def search_s(self) -> float | None:
        """Return the seconds of one search: an equal share of the budget for each subject."""
        budget = self.plan.search.budget_s if self.plan.search else None
        return None if budget is None else budget / len(self.subjects)

    def corpus_of(self, subject: Subject) -> str:
        return subject.corpus or self.plan.corpus


def outcomes(bench: Bench) -> list[Outcome]:
    """An empty outcome for each subject, in order, for `run` to fill."""
    return [Outcome(subject, planned=bench.plan.repeats) for subject in bench.subjects]


def run(bench: Bench, into: Sequence[Outcome], notify: Notify, kept: Callable[[Outcome], object]) -> None:
    """Run everything that `into` lacks, filling it; `kept` hears of an outcome after each run that it gained, so that nothing measured is lost.

    Each complete run is also written down for `resume`, before its quality check: one that was cut short is made up.
    If it is interrupted, it ends its children first.
    """
    named = {outcome.subject.name: outcome for outcome in into}
    bench = replace(bench, users=_users(bench, named, notify))
    checker = quality.Checker(bench.plan.quality, bench.model, bench.output / "runs")
    order = bench.order
    for number, one in enumerate(order, 1):
        outcome = named[one.configuration]
        unchecked = one.repeat == 0 and not outcome.check_done
        if outcome.failure or (outcome.has(one) and not unchecked):
            continue
        shown = 0 if outcome.has(one) else number  # a check that is made up is no run

        def tell(
            phase: str,
            seconds: float = 0.0,
            live: generator.LoadProgress | None = None,
            done: str | None = None,
            one: Run = one,
            number: int = shown,
        ) -> None:
            notify(Progress(one.configuration, number, len(order), phase, seconds, live, done))

        try:
            _measure(bench, outcome, one, checker, tell, _capacity(into))
        except InferctlError as error:
            outcome.failure = error.message
        finally:
            if outcome.measurements:
                kept(outcome)


def _measure(
    bench: Bench, outcome: Outcome, one: Run, checker: quality.Checker, tell: Tell, capacity_rps: float | None
) -> None:
    """Measure what was not measured yet, and check the quality where it was not checked."""
    folder = bench.output / "runs" / one.name
    if outcome.has(one):
        folder /= "quality"
    folder.mkdir(parents=True, exist_ok=True)
    subject = outcome.subject
    started = time.time()
    with contextlib.ExitStack() as stack:
        # Before the server starts: who is on a GPU now is not of ours.
        watch = stack.enter_context(telemetry.Watch())
        child = stack.enter_context(_started(bench, subject, folder, tell)) if not subject.url else None
        aim = child.target if child else target.connect(subject.url or "", access=bench.access)
        if not outcome.has(one):
            session = Session(aim, child, watch, tell)
            plain = functools.partial(_loaded, capacity_rps=capacity_rps)
            take = _searched if bench.plan.search else _paired if bench.plan.neighbours else plain
            measurement = take(bench, subject, session, one, folder)
            measurement.started = started
            measurement.concurrency = bench.users.get(subject.name)
            outcome.measurements.append(measurement)
            resume.keep(bench.output, measurement, None)
            tell("measured", done=f"measured: {_brief(measurement)}")
        if one.repeat == 0:
            tell("checking quality")
            outcome.quality = quality.unchecked("the check was interrupted")
            outcome.quality = checker(aim, lambda passed: tell("computing the fp32 reference", passed))
            if child:
                child.check()
            outcome.check_done = not checker.failed
            first = next(m for m in outcome.measurements if m.run == one)
            resume.keep(bench.output, first, outcome.quality if outcome.check_done else None)
        tell("stopping")


def _users(bench: Bench, into: Mapping[str, Outcome], notify: Notify) -> dict[str, dict[str, Any]]:
    """Find the users of the subjects whose load has `users: auto`; those with equal loads and texts get equal users.

    What was found lies in the bench's folder for `resume`.
    """
    wanted = [one for one in bench.subjects if bench.load_of(one).auto_users and not bench.plan.search]
    file = bench.output / CONCURRENCY
    if not wanted:
        return {}
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        for name, message in known["failed"].items():
            into[name].failure = message
        return dict(known["found"])
    found: dict[str, concurrency.Found] = {}
    for subject in wanted:
        try:
            found[subject.name] = _saturated(bench, subject, notify)
        except InferctlError as error:
            into[subject.name].failure = error.message
    asked = {one.name: (bench.load_of(one).model_dump_json(), bench.corpus_of(one)) for one in wanted}
    most = {
        load: max(one.users for name, one in found.items() if asked[name] == load)
        for load in {asked[name] for name in found}
    }
    made = {name: one.as_dict(most[asked[name]]) for name, one in found.items()}
    if made:
        failed = {one.name: into[one.name].failure for one in wanted if one.name not in made}
        resume.write(file, {"found": made, "failed": failed})
    return made


def _saturated(bench: Bench, subject: Subject, notify: Notify) -> concurrency.Found:
    """Put short closed loops on one subject, with ever more users."""
    folder = bench.output / "runs" / f"{subject.name}-users"
    folder.mkdir(parents=True, exist_ok=True)
    load, corpus = bench.load_of(subject), bench.corpus_of(subject)
    phase, total = ["starting"], len(bench.order)

    def tell(
        step: str,
        seconds: float = 0.0,
        live: generator.LoadProgress | None = None,
        done: str | None = None,
        **_: object,
    ) -> None:
        notify(Progress(subject.name, 0, total, f"finding users: {phase[0]}", seconds, live, done))

    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(telemetry.Watch())
        child = stack.enter_context(_started(bench, subject, folder, tell)) if not subject.url else None
        aim = child.target if child else target.connect(subject.url or "", access=bench.access)
        session = Session(aim, child, watch, tell)

        def measure(users: int, seconds: float) -> concurrency.Step:
            phase[0] = str(users)
            place = folder / f"{users:05d}"
            place.mkdir(exist_ok=True)
            changes = {
                "users": users,
                "duration_s": seconds,
                "warmup_s": load.warmup_s if users == concurrency.FIRST else seconds,
                "window_s": min(load.window_s, concurrency.WINDOW_S),
            }
            kept = {key: value for key, value in throughput.closed(load).model_dump().items() if key not in changes}
            shaped = Load.model_validate({**kept, **changes})
            work = workload.draw(shaped, corpus, bench.plan.seed)
            made = session.measure(shaped, work, Run(subject.name, 0), place)
            shutil.rmtree(place, ignore_errors=True)
            rate = throughput.steady(made.part)
            return concurrency.Step(users, round(rate, 3), made.resources.get("client_cpu_percent"))

        found = concurrency.find(measure)
        tell("found", done=f"users: {found.users} ({'saturated' if found.saturated else 'not saturated'})")
        return found


@contextlib.contextmanager
def _started(
    bench: Bench, subject: Subject, folder: Path, tell: Tell, number: int = 0
) -> Iterator[child_server.ChildServer]:
    """Server 0 is the one that is measured, the others are its neighbours."""
    if bench.command is None or subject.precision is None:
        raise InferctlError(f"{subject.name} has neither a URL nor a precision")
    announce = folder / "announce.json"
    arguments = [*bench.command(subject.precision, announce)]
    if subject.max_batch_tokens:
        arguments += ["--max-batch-tokens", str(subject.max_batch_tokens)]
    arguments = neighbors.placed(arguments, bench.slices, number)
    phase = f"starting neighbour {number}" if number else "starting"
    with child_server.serve(arguments, announce, folder, lambda passed: tell(phase, passed)) as child:
        yield child


def _loaded(
    bench: Bench, subject: Subject, session: Session, one: Run, folder: Path, capacity_rps: float | None
) -> Measurement:
    load, corpus = bench.load_of(subject), bench.corpus_of(subject)
    seed, closed = _seed(bench, load, one), None
    if load.capacity_percent is not None:
        closed = throughput.measure(session, load, corpus, seed, one, folder)
        # All targets receive the same rate, so that their latencies can be compared.
        closed["reference_rps"] = capacity_rps or closed["requests_per_s"]
        load = load.at(closed["reference_rps"])
    work = workload.draw(load, corpus, seed)
    made = session.measure(load, work, one, folder)
    made.workload = describe(work, load, corpus, seed)
    made.closed_loop = closed
    return made


def _capacity(into: Sequence[Outcome]) -> float | None:
    """Return the capacity that the first run of this bench measured, if its rates are shares of one."""
    known = (m.closed_loop["reference_rps"] for one in into for m in one.measurements if m.closed_loop)
    return next(known, None)


def _seed(bench: Bench, load: Load, one: Run) -> int:
    """Return the seed of a run. A trace is replayed as it is, in each repeat."""
    return bench.plan.seed if load.trace else bench.plan.seed_of(one.repeat)


def _paired(bench: Bench, subject: Subject, session: Session, one: Run, folder: Path) -> Measurement:
    """The run, and the same beside busy neighbours."""
    load, corpus = bench.load_of(subject), bench.corpus_of(subject)
    seed = _seed(bench, load, one)
    pair = neighbors.Pair(
        session,
        load,
        corpus,
        seed,
        bench.plan.neighbours,
        start=lambda number, place: _started(bench, subject, place, session.tell, number),
    )
    made = neighbors.measure(pair, one, folder)
    made.workload = describe(workload.draw(load, corpus, seed), load, corpus, seed)
    return made


def _searched(bench: Bench, subject: Subject, session: Session, one: Run, folder: Path) -> Measurement:
    settings, corpus = bench.plan.search, bench.corpus_of(subject)
    slo = (settings and settings.slo_p99_ms) or bench.slo_p99_ms
    if settings is None or slo is None:
        raise UsageError(
            "a search needs to know which p99 must hold",
            "give --slo 100 (ms), `search.slo_p99_ms`, or `slo.p99_ms` in the spec",
        )
    text = workload.read_corpus(corpus)[0][0]
    numbers = itertools.count()

    def ask() -> object:
        return session.aim.embed([f"{next(numbers)} {secrets.token_hex(4)} {text}"], 30)

    def take(load: Load, work: workload.Workload, place: Path, seed: int, check: Callable[[], None]) -> Measurement:
        # Folders of probes are named as in 03-bisect-48.5.
        label = place.name.partition("-")[2].replace("-", " ")

        def told(phase: str, *rest: Any, **more: Any) -> None:
            session.tell(f"{label}, {phase}", *rest, **more)

        made = replace(session, tell=told).measure(load, work, one, place, check)
        made.workload = describe(work, load, corpus, seed)
        return made

    idle_s = min(search.settle(ask, 0, None) for _ in range(5))
    return search.Searcher(
        settings=settings,
        slo_p99_ms=slo,
        load=bench.load_of(subject),
        corpus=corpus,
        seed=bench.plan.seed,
        folder=folder,
        take=take,
        settle=lambda patience: search.settle(ask, patience, idle_s),
        budget=bench.plan.error_budget_percent / 100,
        seconds=bench.search_s,
        told=lambda probe: session.tell("search", done=f"{probe.stage} {probe.rate:g}/s: {probe.reason}"),
    ).run()


def _brief(measurement: Measurement) -> str:
    """One line on a run that has just ended."""
    found = summary.summarise([measurement.part])
    latency = found["latency_ms"]
    figures = [f"{key} {latency[key]['value']:.1f}" for key in ("p50", "p99") if latency[key]["value"] is not None]
    return f"{found['requests_per_s']:.1f} req/s" + (f", {' '.join(figures)} ms" if figures else "")


def _sent_other_work(workloads: Sequence[dict[str, Any]]) -> bool:
    """Return whether a corpus or a trace changed between runs: one seed then has two digests, or one corpus two."""
    digests = {(one.get("seed"), one.get("sha256")) for one in workloads}
    corpora = {one.get("corpus_sha256") for one in workloads}
    return len(digests) > len({seed for seed, _ in digests}) or len(corpora) > 1


def judge(
    outcome: Outcome, cores: int, budget_percent: float = 0.1
) -> tuple[summary.Summary, list[validity.Validity], validity.Validity]:
    """Pooled summary of an outcome with runs, the validity of each run, and that of the whole."""
    each = [
        validity.both(
            validity.both(
                validity.judge(summary.summarise([m.part]), m.resources, m.state, cores, searched=m.search is not None),
                telemetry.judge(m.telemetry),
            ),
            throughput.judge(m, cores),
        )
        for m in outcome.measurements
    ]
    pooled = summary.summarise([m.part for m in outcome.measurements])
    whole = validity.combine(
        each, pooled, budget_percent, searched=any(m.search is not None for m in outcome.measurements)
    )
    if closed := throughput.pooled(outcome.measurements):
        said = validity.failed(closed["summary"], budget_percent)
        whole = validity.both(whole, said)
    reasons = (*whole.reasons, *validity.same([m.info for m in outcome.measurements]).reasons)
    if _sent_other_work([m.workload for m in outcome.measurements]):
        reasons = (*reasons, "the runs differ in what was sent: a corpus or a trace changed meanwhile")
    if beside := neighbors.document(outcome.measurements, cores, budget_percent):
        whole = validity.both(whole, validity.Validity((), tuple(beside["cautions"])))
        reasons = (*reasons, *beside["reasons"])
    if outcome.failure:
        reasons = (*reasons, outcome.failure)
    cautions = (outcome.interrupted, *whole.cautions) if outcome.interrupted else whole.cautions
    return pooled, each, validity.Validity(reasons, cautions)
