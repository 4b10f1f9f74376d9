"""The closed loop before each open loop whose rate is a share of the capacity: `rate: 60%` in a plan.

    run 1:      closed loop ─► requests/s, which is the capacity ─► open loop at 60 % of it ─► latency
    other runs: closed loop ─► requests/s                        ─► open loop at the same rate ─► latency

A closed loop sends less to a server that stalls, and so hardly sees the stall: latency needs an open loop. An open loop
receives what it sends: throughput needs a closed one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inferctl.bench.judge import summary, validity
from inferctl.bench.load import generator, records
from inferctl.bench.measure import telemetry
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Run
from inferctl.bench.plan.shape import Load
from inferctl.errors import InferctlError

if TYPE_CHECKING:
    from inferctl.bench.measure.outcome import Measurement
    from inferctl.bench.measure.session import Session

_FOLDER = "closed-loop"


def closed(load: Load) -> Load:
    """Return the closed loop that comes before `load`: the same requests, from `users` clients, for `capacity_s`."""
    other = ("auto_users", "mode", "rate", "capacity_percent", "capacity_s", "duration_s", "spike", "stages", "trace")
    kept = {key: value for key, value in load.model_dump().items() if key not in other}
    return Load.model_validate({**kept, "mode": "closed", "duration_s": load.capacity_s})


def measure(session: Session, load: Load, corpus: str, seed: int, run: Run, folder: Path) -> dict[str, Any]:
    """Run the closed loop and return it as plain data, with its requests/s. Its records lie in a folder of their own.

    Raises `InferctlError` if the server answered nothing.
    """
    place = folder / _FOLDER
    place.mkdir(parents=True, exist_ok=True)
    tell = session.tell

    def labeled(phase: str, *rest: Any, **more: Any) -> None:
        tell(f"closed loop, {phase}", *rest, **more)

    shaped = closed(load)
    work = workload.draw(shaped, corpus, seed)
    made = replace(session, tell=labeled).measure(shaped, work, run, place)
    rate = summary.summarise([made.part])["requests_per_s"]
    if not rate:
        raise InferctlError(
            f"the server answered nothing to a closed loop of {shaped.users} users",
            "set `rate` in requests/s, or give the loop more time with `capacity_s`",
        )
    return {
        "users": shaped.users,
        "requests_per_s": rate,
        "window": [made.part.start_ns, made.part.end_ns],
        "inputs_per_request": made.part.inputs_per_request,
        "serial": made.serial,
        "state": made.state,
        "resources": made.resources,
        "telemetry": made.telemetry,
    }


def steady(part: summary.Part) -> float:
    """Return requests/s of a short closed loop, where each request counts by its share inside the window.

    Responses come in batches. In a short window the number of whole responses depends on where the window ends.
    """
    good = part.rows[part.rows["error"] == records.OK]
    begun, ended = (good[name].astype(np.float64) for name in ("intended_ns", "end_ns"))
    inside = np.minimum(ended, part.end_ns) - np.maximum(begun, part.start_ns)
    shares = np.maximum(inside, 0) / np.maximum(ended - begun, 1)
    return float(shares.sum()) / part.seconds


def judge(measurement: Measurement, cores: int) -> validity.Validity:
    """Return the validity of the closed loop of a run; valid where there was none."""
    if not (found := measurement.closed_loop):
        return validity.Validity((), ())
    said = validity.both(
        validity.judge(summary.summarise([_part(measurement)]), found["resources"], found["state"], cores),
        telemetry.judge(found["telemetry"]),
    )
    return validity.Validity(*(tuple(f"closed loop: {one}" for one in each) for each in (said.reasons, said.cautions)))


def pooled(measurements: Sequence[Measurement]) -> dict[str, Any] | None:
    """Return the receipt's `closed_loop` key of all runs together; None where there was no closed loop."""
    kept = [one for one in measurements if one.closed_loop]
    if not kept:
        return None
    first = kept[0].closed_loop or {}
    keys = ("users", "reference_rps")
    return {key: first[key] for key in keys} | {"summary": summary.summarise([_part(one) for one in kept])}


def of_run(measurement: Measurement) -> dict[str, Any] | None:
    """Return what a receipt says of the closed loop of one run."""
    if not (found := measurement.closed_loop):
        return None
    files = records.files(measurement.folder / _FOLDER)
    return {
        "users": found["users"],
        "serial": found["serial"],
        "summary": summary.summarise([_part(measurement)]),
        "resources": found["resources"],
        "records": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }


def _part(measurement: Measurement) -> summary.Part:
    found = measurement.closed_loop or {}
    start, end = found["window"]
    rows = generator.read_records(measurement.folder / _FOLDER, found["state"])
    return summary.Part(rows, start, end, found["inputs_per_request"])
