"""Runs a plan: a server per run, warm-up, load, quality, in an order that lets slow drifts of the machine cancel out.

    for each run (A B C D, D C B A, …):  start server ─► warm up ─► measure ─► compare with fp32 (first time) ─► stop server
    for each configuration:              pool its runs ─► judge ─► receipt

A configuration that cannot run becomes an outcome with its reason and the others go on. Whatever ends this, no child process is left.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferctl.bench import load as loads
from inferctl.bench import procfs, quality, server, summary, target, validity, workload
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
    """One run that gave records."""

    run: Run
    started: float
    part: summary.Part
    state: dict[str, Any]
    resources: dict[str, float]
    folder: Path
    ready_s: float | None


@dataclass
class Outcome:
    """Everything about one subject. `failure` says why it has fewer runs than planned, in one line."""

    subject: Subject
    measurements: list[Measurement] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=lambda: quality.unchecked("no run got that far"))
    failure: str | None = None


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
    cores: int


def run(bench: Bench, notify: Notify) -> list[Outcome]:
    """Run everything; one outcome a subject, in the plan's order. SIGTERM is taken like Ctrl-C: children are ended, then it is raised."""
    work = workload.draw(bench.plan.load, bench.plan.corpus, bench.plan.seed)
    outcomes = {subject.name: Outcome(subject) for subject in bench.subjects}
    # Differs from bench to bench, so that a server that lives through several of them never sees an input again.
    serial = int(time.time() / 60) % 10_000 * 10
    with interruptible():
        expected = _reference(bench, notify)
        order = bench.plan.runs()
        for number, one in enumerate(order, 1):
            outcome = outcomes[one.configuration]
            if outcome.failure:
                continue

            def tell(
                phase: str, seconds: float = 0.0, live: loads.Live | None = None, one: Run = one, number: int = number
            ) -> None:
                notify(Progress(one.configuration, number, len(order), phase, seconds, live))

            try:
                _measure(bench, work, outcome, one, expected, serial + 2 * one.repeat, tell)
            except InferctlError as error:
                outcome.failure = error.message
    return list(outcomes.values())


def _reference(bench: Bench, notify: Notify) -> quality.Reference | str:
    """The fp32 vectors to compare with, or why there are none."""
    limits = bench.plan.quality
    if limits is None:
        return "the plan asks for no quality check"
    if bench.model is None:
        return "no local model folder was given to compare with"
    texts, _ = workload.read_corpus(limits.corpus)
    try:
        return quality.reference(
            bench.model,
            texts[: limits.texts],
            lambda passed: notify(Progress("fp32 reference", 0, len(bench.plan.runs()), "computing", passed)),
        )
    except InferctlError as error:
        return error.message


def _measure(
    bench: Bench,
    work: workload.Workload,
    outcome: Outcome,
    one: Run,
    expected: quality.Reference | str,
    serial: int,
    tell: Callable[..., None],
) -> None:
    folder = bench.output / "runs" / one.name
    folder.mkdir(parents=True, exist_ok=True)
    subject = outcome.subject
    started = time.time()
    with contextlib.ExitStack() as stack:
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
        outcome.info = outcome.info or aim.info
        measurement = _load(bench, work, aim, child, one, folder, serial, tell)
        measurement.started = started
        outcome.measurements.append(measurement)
        if one.repeat == 0:
            tell("checking quality")
            outcome.quality = _quality(bench, aim, expected)
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
    serial: int,
    tell: Callable[..., None],
) -> Measurement:
    plan = bench.plan.load
    description = loads.prepare(plan, work, aim, serial, folder)
    with procfs.Sampler({"server": child.process.pid} if child else {}) as sampler:
        try:
            done = loads.run(
                plan, description, lambda live: tell(live.phase, 0.0, live), child.check if child else lambda: None
            )
        finally:
            for scratch in ("bodies.jsonl", "order.bin", "schedule.bin", "warmup_schedule.bin"):
                (folder / scratch).unlink(missing_ok=True)
    start, end = done.state["measure_start_ns"], done.state["measure_end_ns"]
    resources = sampler.between(start, end)
    if (client := summary.client_cpu_percent(done.state)) is not None:
        resources["client_cpu_percent"] = client
        if "other_cores" in resources:
            resources["other_cores"] = round(max(0.0, resources["other_cores"] - client / 100), 3)
    offered = len(work.schedule_ns) if plan.mode == "open" else None
    part = summary.Part(done.rows, start, end, plan.inputs_per_request, offered)
    return Measurement(one, 0.0, part, done.state, resources, folder, aim.info.get("ready_seconds"))


def _quality(bench: Bench, aim: target.Target, expected: quality.Reference | str) -> dict[str, Any]:
    if isinstance(expected, str):
        return quality.unchecked(expected)
    served = (aim.info.get("model") or {}).get("sha256")
    if served != expected.model_sha256:
        what = (
            f"the server's weights ({served[:12]}…) are not those of the local folder"
            if served
            else "the server does not say which weights it has"
        )
        return quality.unchecked(what)
    if bench.plan.quality is None:
        return quality.unchecked("the plan asks for no quality check")
    try:
        return quality.check(aim, expected, bench.plan.quality)
    except InferctlError as error:
        return quality.unchecked(error.message)


def judge(outcome: Outcome, cores: int) -> tuple[dict[str, Any], list[validity.Validity], validity.Validity]:
    """Pooled summary of an outcome with runs, the validity of each run, and that of the whole."""
    each = [validity.judge(summary.summarise([m.part]), m.resources, m.state, cores) for m in outcome.measurements]
    pooled = summary.summarise([m.part for m in outcome.measurements])
    whole = validity.combine(each, pooled)
    if outcome.failure:
        whole = validity.Validity((*whole.reasons, outcome.failure), whole.cautions)
    return pooled, each, whole


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
