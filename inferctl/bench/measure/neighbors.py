"""`--neighbours N`: one server alone and beside N busy ones on the same device, in turns.

for each pair:  start the server and its N neighbours, all idle
                without: warm up, measure            (the run that the receipt describes)
                with:    keep every neighbour busy ─► warm up, measure ─► were they busy to the end? ─► let them be
                (every second pair the other way round, so that slow drifts cancel out)
all pairs:      inflation of the latencies, and what the neighbours themselves achieved
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferctl.bench.judge import interference, summary, validity
from inferctl.bench.load import generator, procfs, records
from inferctl.bench.measure import telemetry
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Load, Run
from inferctl.errors import InferctlError, UsageError

if TYPE_CHECKING:
    from inferctl.bench.load.child_server import ChildServer
    from inferctl.bench.measure.outcome import Measurement
    from inferctl.bench.measure.session import Session

BUSY_S = 30.0
# An answer of a neighbour that comes after a run has ended shows that it outlived the run; one takes no longer than this.
LINGER_S = 10.0
FAILED_LIMIT = 0.05
_WITH = "with-neighbours"


class _Enough(Exception):  # noqa: N818 - no error: the run beside which it was busy is over
    """A neighbour need not be busy any longer."""


class Busy:
    """A load on a neighbour, in a thread. `failure` is why it ended by itself, None while it lasts or was ended by us."""

    def __init__(self, number: int, server: ChildServer, folder: Path, description: Path, load: Load) -> None:
        self.number, self.folder = number, folder
        self.over = threading.Event()
        self.failure: str | None = None
        self._server = server
        self.thread = threading.Thread(target=self._run, args=(description, load), daemon=True)

    def _run(self, description: Path, load: Load) -> None:
        try:
            generator.run(load, description, lambda live: None, self._check)
            self.failure = "its load ended by itself"
        except _Enough:
            pass
        except InferctlError as error:
            self.failure = error.message

    def _check(self) -> None:
        if self.over.is_set():
            raise _Enough
        self._server.check()

    def rows(self) -> records.Rows | None:
        """Its records so far; None while there are none."""
        with contextlib.suppress(InferctlError, OSError, ValueError):
            found = records.merge(self.folder)
            return found if len(found) else None
        return None

    def wait(self, after_ns: int, patience_s: float) -> bool:
        """Wait until an answer has come after `after_ns` (CLOCK_MONOTONIC); False when none did in time."""
        limit = time.monotonic() + patience_s
        while time.monotonic() < limit and self.failure is None:
            rows = self.rows()
            if rows is not None and int(rows["end_ns"].max()) >= after_ns:
                return True
            time.sleep(0.1)
        return False


@dataclass(frozen=True)
class Pair:
    """What a pair of runs is made of: the server under measurement (`session`), what it is sent, how neighbour n is started in a folder."""

    session: Session
    load: Load
    corpus: str
    seed: int
    count: int
    start: Callable[[int, Path], AbstractContextManager[ChildServer]]


def measure(pair: Pair, run: Run, folder: Path) -> Measurement:
    """Both runs of a pair; returns the one without busy neighbours, with the other as its `beside`.

    Raises `InferctlError` when a server does not start or a neighbour is not to be kept busy.
    """
    without: Measurement | None = None
    beside: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(1, pair.count + 1):
            place = folder / f"neighbour-{number}"
            place.mkdir(parents=True, exist_ok=True)
            servers.append(stack.enter_context(pair.start(number, place)))
        pair.session.watch.ours |= {one.process.pid for one in servers}
        for busy in order(run.repeat):
            if busy:
                beside = _beside(pair, servers, run, folder)
            else:
                without = _taken(pair, run, folder, "alone")
    assert without  # `order` has both
    return replace(without, beside=beside)


def order(repeat: int) -> tuple[bool, bool]:
    """Whether the neighbours are busy in the first and in the second run of a pair."""
    return (False, True) if repeat % 2 == 0 else (True, False)


def _taken(pair: Pair, run: Run, folder: Path, how: str) -> Measurement:
    work = workload.draw(pair.load, pair.corpus, pair.seed)
    tell = pair.session.tell

    def told(phase: str, *rest: Any, **more: Any) -> None:
        tell(f"{phase}, {how}", *rest, **more)

    return replace(pair.session, tell=told).measure(pair.load, work, run, folder)


def _beside(pair: Pair, servers: Sequence[ChildServer], run: Run, folder: Path) -> dict[str, Any]:
    """The run with busy neighbours, as plain data; its records lie in a folder of their own."""
    place = folder / _WITH
    place.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        busy = []
        for number, one in enumerate(servers, 1):
            pair.session.tell(f"waking neighbour {number}")
            busy.append(stack.enter_context(_busy(pair, number, one, folder / f"neighbour-{number}")))
        # This process and all below it: the server, its neighbours and every load. What is left was not meant to be there.
        with procfs.Sampler({"bench": os.getpid()}) as everything:
            made = _taken(pair, run, place, f"beside {pair.count}")
        part = made.part
        others = []
        for load in busy:
            lasted = load.wait(part.end_ns, LINGER_S)
            rows = load.rows()
            done = {} if rows is None else interference.achieved(rows, part.start_ns, part.end_ns)
            others.append({"number": load.number, **done, "outlived": lasted, "failure": load.failure})
    used = everything.between(part.start_ns, part.end_ns)
    resources = made.resources | {key: used[key] for key in ("other_cores",) if key in used}
    return {
        "window": [part.start_ns, part.end_ns],
        "inputs_per_request": part.inputs_per_request,
        "offered": part.offered,
        "serial": made.serial,
        "state": made.state,
        "resources": resources,
        "telemetry": made.telemetry,
        "others": others,
        "count": pair.count,
        "users": background(pair.load).users,
    }


@contextlib.contextmanager
def _busy(pair: Pair, number: int, server: ChildServer, folder: Path) -> Iterator[Busy]:
    """Keep a neighbour busy until the block ends; it has answered before the block begins."""
    load = background(pair.load)
    work = workload.draw(load, pair.corpus, pair.seed + number)
    serial = 100_000 + 2 * secrets.randbelow(450_000)
    one = Busy(number, server, folder, generator.prepare(load, work, server.target, serial, folder), load)
    one.thread.start()
    try:
        if not one.wait(0, BUSY_S):
            raise InferctlError(f"neighbour {number} is not busy: {one.failure or 'it answers nothing'}")
        yield one
    finally:
        one.over.set()
        one.thread.join()
        for scratch in ("bodies.jsonl", "order.bin", "schedule.bin", "warmup_schedule.bin"):
            (folder / scratch).unlink(missing_ok=True)


def background(load: Load) -> Load:
    """The load that keeps a neighbour busy: a closed loop of the plan's users, that outlasts any run of `load`."""
    longest = 2 * load.warmup_s + load.duration_s + 4 * load.timeout_s + 120
    return Load.model_validate(
        {
            "mode": "closed",
            "users": load.users,
            "duration_s": min(longest, 86_400),
            "warmup_s": 0,
            "timeout_s": load.timeout_s,
            "inputs_per_request": load.inputs_per_request,
        }
    )


def document(measurements: Sequence[Measurement], cores: int, budget_percent: float = 0.1) -> dict[str, Any] | None:
    """The receipt's `neighbours` key (docs/bench.md describes it) of all pairs; None where there were no neighbours."""
    pairs = [(one, one.beside) for one in measurements if one.beside]
    if not pairs:
        return None
    parts = [_part(one, beside) for one, beside in pairs]
    alone = summary.summarise([one.part for one, _ in pairs])
    together = summary.summarise(parts)
    rates = [other["requests_per_s"] for _, beside in pairs for other in beside["others"] if "requests_per_s" in other]
    return {
        "count": pairs[0][1]["count"],
        "users": pairs[0][1]["users"],
        **interference.inflation([one.part for one, _ in pairs], parts).as_dict(),
        "requests_per_s": {"without": alone["requests_per_s"], "with": together["requests_per_s"]},
        "neighbour_requests_per_s": {"min": min(rates), "max": max(rates)} if rates else None,
        **_judged(pairs, parts, cores, validity.failed(together, budget_percent)).as_dict(),
        "runs": [
            {
                "repeat": one.run.repeat,
                "first": "with" if order(one.run.repeat)[0] else "without",
                "summary": summary.summarise([part]),
                "resources": beside["resources"],
                "telemetry": beside["telemetry"],
                "serial": beside["serial"],
                "others": beside["others"],
                "records": {
                    file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                    for file in records.files(one.folder / _WITH)
                },
            }
            for (one, beside), part in zip(pairs, parts, strict=True)
        ],
    }


def _part(one: Measurement, beside: Mapping[str, Any]) -> summary.Part:
    start, end = beside["window"]
    return summary.Part(records.merge(one.folder / _WITH), start, end, beside["inputs_per_request"], beside["offered"])


def _judged(
    pairs: Sequence[tuple[Measurement, dict[str, Any]]],
    parts: Sequence[summary.Part],
    cores: int,
    failed: validity.Validity,
) -> validity.Validity:
    """Return whether the inflation is valid: the neighbors outlived each run and responded, and each run next to them
    is valid by itself. `failed` judges the failed requests of these runs together."""
    reasons = [f"beside neighbours: {reason}" for reason in failed.reasons]
    cautions = [f"beside neighbours: {caution}" for caution in failed.cautions]
    for (one, beside), part in zip(pairs, parts, strict=True):
        found = validity.both(
            validity.judge(summary.summarise([part]), beside["resources"], beside["state"], cores),
            telemetry.judge(beside["telemetry"]),
        )
        run = f"beside neighbours, run {one.run.repeat + 1}"
        reasons += [f"{run}: {reason}" for reason in found.reasons]
        cautions += [f"beside neighbours: {caution}" for caution in found.cautions]
        for other in beside["others"]:
            if why := _not_busy(other, part.seconds):
                reasons.append(f"{run}: neighbour {other['number']} {why}")
    return validity.Validity(tuple(reasons), tuple(dict.fromkeys(cautions)))


def _not_busy(other: Mapping[str, Any], seconds: float) -> str | None:
    if other["failure"] or not other["outlived"]:
        return f"did not outlive the run ({other['failure'] or 'no answer came after its end'})"
    done = other["requests_per_s"] * seconds
    if other["failed"] > FAILED_LIMIT * (done + other["failed"]):
        return f"answered {other['failed']} requests with errors, so it was not busy as meant"
    return None


def placed(arguments: Sequence[str], slices: Sequence[str], number: int) -> list[str]:
    """The command of server `number` (0 is measured) on its slice of the GPU, where there are slices: the first has one to itself."""
    if not slices:
        return list(arguments)
    others = slices[1:] or slices
    slot = slices[0] if number == 0 else others[(number - 1) % len(others)]
    return ["env", f"CUDA_VISIBLE_DEVICES={slot}", *arguments]


def slices(variables: Mapping[str, str]) -> list[str]:
    """MIG devices to spread servers over: those in CUDA_VISIBLE_DEVICES, else those of the first GPU in slices; none: all share one device."""
    if listed := [one.strip() for one in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]:
        return listed if all(one.startswith("MIG-") for one in listed) else []
    return telemetry.slices()


def refuse(urls: Sequence[str]) -> None:
    """Raise `UsageError` when a server that runs already is to be measured: nothing says who shares its device."""
    if urls:
        raise UsageError(
            f"--neighbours starts the server and its neighbours itself, and {urls[0]} runs already",
            "leave --url away and choose with --precision",
        )
