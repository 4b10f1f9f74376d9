"""Runs a plan: a server per run, warm-up, load, quality, in an order that lets slow drifts of the machine cancel out.

    for each run (A B C D, D C B A, …):  start server ─► warm up ─► measure ─► compare with fp32 (first time) ─► stop server
    for each configuration, each time:   pool its runs ─► judge ─► receipt

A configuration that cannot run becomes an outcome with its reason and the others go on. Whatever ends this, no child process is left.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferctl.bench import load as loads
from inferctl.bench import procfs, quality, server, summary, target, telemetry, validity, workload
from inferctl.bench.plan import Plan, Run
from inferctl.errors import InferctlError


@dataclass(frozen=True)
class Subject:
    """What is measured under one name: a precision to start our own server in, or the `url` of one that runs already."""

    name: str
    precision: str | None = None
    url: str | None = None


@dataclass
class Measurement:
    """One run that gave records. `info` is what the server said of itself then; `serial` is the number that its inputs began with."""

    run: Run
    started: float
    part: summary.Part
    state: dict[str, Any]
    resources: dict[str, float]
    folder: Path
    info: dict[str, Any]
    serial: int
    telemetry: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """Everything about one subject. `failure` says why it has fewer runs than `planned`, in one line; None when it was interrupted."""

    subject: Subject
    measurements: list[Measurement] = field(default_factory=list)
    quality: dict[str, Any] = field(default_factory=lambda: quality.unchecked("no run got that far"))
    failure: str | None = None
    planned: int = 1

    @property
    def info(self) -> dict[str, Any]:
        """What the server said of itself at the first run; `judge` holds the others against it."""
        return self.measurements[0].info if self.measurements else {}

    @property
    def interrupted(self) -> str | None:
        """How far it got when the bench ended before its last run; None when it got there or failed."""
        done = len(self.measurements)
        return None if self.failure or done >= self.planned else f"interrupted after {done} of {self.planned} runs"


@dataclass(frozen=True)
class Progress:
    """What is happening now. `number` of `total` runs; `seconds` in this phase; `live` while a load runs."""

    name: str
    number: int
    total: int
    phase: str
    seconds: float = 0.0
    live: loads.Live | None = None


Notify = Callable[[Progress], None]


@dataclass(frozen=True)
class Bench:
    """What `run` needs: the plan, its subjects, how to start a server, the model folder for the quality check, and where to write.

    `model` may be None when only running servers are measured; their vectors are then not checked.
    """

    plan: Plan
    subjects: Sequence[Subject]
    command: server.Command | None
    model: Path | None
    output: Path


def outcomes(bench: Bench) -> list[Outcome]:
    """An empty outcome for each subject, in order, for `run` to fill."""
    return [Outcome(subject, planned=bench.plan.repeats) for subject in bench.subjects]


def run(bench: Bench, into: Sequence[Outcome], notify: Notify, kept: Callable[[Outcome], object]) -> None:
    """Run everything, filling `into`; `kept` hears of an outcome after each run that it gained, so that nothing measured is lost.

    SIGTERM is taken like Ctrl-C: children are ended, then it is raised.
    """
    work = workload.draw(bench.plan.load, bench.plan.corpus, bench.plan.seed)
    named = {outcome.subject.name: outcome for outcome in into}
    checker = quality.Checker(bench.plan.quality, bench.model)
    order = bench.plan.runs([outcome.subject.name for outcome in into])
    with interruptible():
        for number, one in enumerate(order, 1):
            outcome = named[one.configuration]
            if outcome.failure:
                continue

            def tell(
                phase: str, seconds: float = 0.0, live: loads.Live | None = None, one: Run = one, number: int = number
            ) -> None:
                notify(Progress(one.configuration, number, len(order), phase, seconds, live))

            try:
                _measure(bench, work, outcome, one, checker, tell)
            except InferctlError as error:
                outcome.failure = error.message
            finally:
                if outcome.measurements:
                    kept(outcome)


def _measure(
    bench: Bench,
    work: workload.Workload,
    outcome: Outcome,
    one: Run,
    checker: quality.Checker,
    tell: Callable[..., None],
) -> None:
    folder = bench.output / "runs" / one.name
    folder.mkdir(parents=True, exist_ok=True)
    subject = outcome.subject
    started = time.time()
    with contextlib.ExitStack() as stack:
        # Before the server starts: who is on a GPU now is not of ours.
        watch = stack.enter_context(telemetry.Watch())
        if subject.url:
            child, aim = None, target.connect(subject.url)
        else:
            if bench.command is None or subject.precision is None:
                raise InferctlError(f"{subject.name} has neither a URL nor a precision")
            announce = folder / "announce.json"
            arguments = bench.command(subject.precision, announce)
            child = stack.enter_context(
                server.running(arguments, announce, folder, lambda passed: tell("starting", passed))
            )
            aim = child.target
        measurement = _load(bench, work, aim, child, one, folder, tell, watch)
        measurement.started = started
        outcome.measurements.append(measurement)
        if one.repeat == 0:
            tell("checking quality")
            outcome.quality = quality.unchecked("the check was interrupted")
            outcome.quality = checker(aim, lambda passed: tell("computing the fp32 reference", passed))
            if child:
                child.check()
        tell("stopping")


def _load(
    bench: Bench,
    work: workload.Workload,
    aim: target.Target,
    child: server.Server | None,
    one: Run,
    folder: Path,
    tell: Callable[..., None],
    watch: telemetry.Watch,
) -> Measurement:
    plan = bench.plan.load
    # Of no seed: a server that lives through several benches must not see an input again. Even (warm-up takes the next
    # number) and always six digits, so that all runs have inputs of one length.
    serial = 100_000 + 2 * secrets.randbelow(450_000)
    description = loads.prepare(plan, work, aim, serial, folder)
    watched = child.process.pid if child else target.process(aim.url)
    watch.ours |= {watched} if watched else set()
    with procfs.Sampler({"server": watched} if watched else {}) as sampler:
        try:
            done = loads.run(
                plan, description, lambda live: tell(live.phase, 0.0, live), child.check if child else lambda: None
            )
        finally:
            for scratch in ("bodies.jsonl", "order.bin", "schedule.bin", "warmup_schedule.bin"):
                (folder / scratch).unlink(missing_ok=True)
    start, end = done.state["measure_start_ns"], done.state["measure_end_ns"]
    resources = sampler.between(start, end)
    if watched is None and target.is_local(aim.url):
        # What the measured server itself used cannot be told from what others did.
        resources.pop("other_cores", None)
    if (client := summary.client_cpu_percent(done.state)) is not None:
        resources["client_cpu_percent"] = client
        if "other_cores" in resources:
            resources["other_cores"] = round(max(0.0, resources["other_cores"] - client / 100), 3)
    offered = len(work.schedule_ns) if plan.mode == "open" else None
    part = summary.Part(done.rows, start, end, plan.inputs_per_request, offered)
    seen = watch.window(
        start, end, aim.info, here=child is not None or target.is_local(aim.url), ours=child is not None
    )
    return Measurement(one, 0.0, part, done.state, resources, folder, aim.info, serial, seen)


def judge(outcome: Outcome, cores: int) -> tuple[dict[str, Any], list[validity.Validity], validity.Validity]:
    """Pooled summary of an outcome with runs, the validity of each run, and that of the whole."""
    each = [
        validity.both(
            validity.judge(summary.summarise([m.part]), m.resources, m.state, cores), telemetry.judge(m.telemetry)
        )
        for m in outcome.measurements
    ]
    pooled = summary.summarise([m.part for m in outcome.measurements])
    whole = validity.combine(each, pooled)
    reasons = (*whole.reasons, *validity.same([m.info for m in outcome.measurements]).reasons)
    if outcome.failure:
        reasons = (*reasons, outcome.failure)
    cautions = (outcome.interrupted, *whole.cautions) if outcome.interrupted else whole.cautions
    return pooled, each, validity.Validity(reasons, cautions)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM, which CI systems send, into KeyboardInterrupt, so that every child is ended on the way out."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
