"""What lets a bench that was killed go on where it stopped: what it was (`bench.json`), and each run that is complete (`run.json`).

    begin   bench.json: plan, subjects, what the figures depend on (identity); sealed        once, before the first run
    keep    runs/NAME/run.json: a measurement, with the sha256 of its records; renamed into place when all of it is there, and
            again with the quality check that follows it
    resume  a run without run.json, or with other records than it names, is thrown away and made again

A folder belongs to one bench at a time (a lock that dies with its process), so no run is made twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import inferctl
from inferctl import assets
from inferctl.bench import receipt
from inferctl.bench.judge import summary
from inferctl.bench.load import generator, records
from inferctl.bench.measure import quality
from inferctl.bench.measure.environment import Environment
from inferctl.bench.measure.outcome import Measurement, Outcome, Subject
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Plan, Run
from inferctl.errors import NotReadyError, UsageError

SCHEMA = "inferctl.run/1"
MANIFEST, DONE = "bench.json", "run.json"
# What `identity` holds, in words.
_NAMES = {
    "plan": "the plan",
    "plan_file": "the plan's file",
    "subjects": "what is measured",
    "corpora": "a corpus",
    "traces": "a trace",
    "model": "the model's weights",
    "spec": "the settings",
    "code": "inferctl's code",
    "machine": "the machine or its software",
    "servers": "a server's weights or precision",
}


def identity(
    plan: Plan,
    subjects: Sequence[Subject],
    environment: Environment,
    model_sha256: str | None,
    spec_sha256: str | None,
    servers: Mapping[str, Any],
    plan_file: str | None,
) -> dict[str, Any]:
    """Everything that the figures of a bench depend on; runs of benches that differ in it must not be pooled. Raises `UsageError`."""
    corpora = {
        plan.corpus,
        *(one.corpus for one in subjects if one.corpus),
        *([plan.quality.corpus] if plan.quality else []),
    }
    traces = {plan.load.trace, *((one.load or {}).get("trace") for one in subjects)}
    file = Path(plan_file) if plan_file else None
    return {
        "plan": plan.model_dump(mode="json"),
        "plan_file": hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None,
        "subjects": [dataclasses.asdict(one) for one in subjects],
        "corpora": {name: workload.read_corpus(name)[1] for name in sorted(corpora)},
        "traces": {name: _trace_sha256(name) for name in sorted(filter(None, traces))},
        "model": model_sha256,
        "spec": spec_sha256,
        "code": {"version": inferctl.__version__, "sha256": code_sha256()},
        "machine": _machine(environment),
        "servers": dict(servers),
    }


def _machine(environment: Environment) -> dict[str, Any]:
    """Hardware, system and the software that the figures come from, flat: so a difference is told by its name."""
    return {
        "cpu": environment.cpu_model,
        "cores": environment.cores,
        "gpus": [gpu.name for gpu in environment.gpus],
        "driver": sorted({gpu.driver for gpu in environment.gpus}),
        "kernel": environment.kernel,
        "python": environment.python,
        **environment.versions,
        **environment.variables,
    }


def _trace_sha256(name: str) -> str:
    try:
        return hashlib.sha256(Path(name).read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(
            f"the trace {name} cannot be read: {error.strerror}",
            "it is looked for where the plan says, from this folder",
        ) from None


def code_sha256() -> str:
    """sha256 (hex) of all of inferctl's code, the load generator's included."""
    package, benchmarks = Path(inferctl.__file__).parent, assets.root() / "benchmarks"
    files = {*package.rglob("*.py"), benchmarks / "locustfile.py", *(benchmarks / "loadgen").glob("*.py")}
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.name}\0".encode() + file.read_bytes())
    return total.hexdigest()


def begin(output: Path, what: Mapping[str, Any], how: Mapping[str, Any]) -> None:
    """Write down what this bench is (`what`: `identity`) and how it was called (`how`), before its first run."""
    document = json.loads(
        receipt.canonical({"schema": SCHEMA, "created": time.time(), "identity": dict(what), "called": dict(how)})
    )
    write(output / MANIFEST, {**document, "seal": receipt.seal_of(document)})


def read(output: Path) -> dict[str, Any]:
    """What the bench in `output` was. Raises `UsageError` when there is none, or it was altered."""
    file = output / MANIFEST
    hint = "give the folder that `inferctl bench` made, as in bench-results/precision-20260102-030405"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{output} holds no bench to go on with: it has no {MANIFEST}", hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {error}", hint) from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UsageError(f"{file} is none of this version's", "start a new bench")
    if document.get("seal") != receipt.seal_of(document):
        raise UsageError(f"{file} was altered after the bench began", "start a new bench")
    return document


def check(then: Mapping[str, Any], now: Mapping[str, Any], output: Path) -> None:
    """Raise `UsageError` that names all that has changed between two `identity` documents."""
    plain = json.loads(receipt.canonical(dict(now)))
    # A plan's file that is gone has not changed: the plan itself is in the folder.
    changed = [key for key in _NAMES if plain.get(key) != then.get(key) and not (key == "plan_file" and not plain[key])]
    if changed:
        told = "; ".join(f"{_NAMES[key]} {_difference(then.get(key), plain.get(key))}" for key in changed)
        raise UsageError(
            f"{output} cannot go on, its runs could not be compared with new ones: {told}",
            "put it back as it was, or start a new bench",
        )


def _difference(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        return f"changed ({', '.join(f'{key}: {_short(then.get(key))} -> {_short(now.get(key))}' for key in keys[:3])})"
    return f"changed ({_short(then)} -> {_short(now)})"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold the folder for this process. Raises `NotReadyError` when another bench has it. The lock ends with the process, however it ends."""
    with (output / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise NotReadyError(f"another bench runs in {output}", "wait for it, or end it first") from None
        yield


def keep(output: Path, measurement: Measurement, quality: Mapping[str, Any] | None) -> None:
    """Write a complete run down, atomically. `quality`: the check that was made with it; None when it is still to be made, or to be tried again."""
    values = {
        one.name: getattr(measurement, one.name)
        for one in dataclasses.fields(measurement)
        if one.name not in ("run", "part", "folder")
    }
    part = measurement.part
    files = records.files(measurement.folder)
    document = {
        "schema": SCHEMA,
        "run": dataclasses.asdict(measurement.run),
        "folder": measurement.folder.relative_to(output).as_posix(),
        "window": [part.start_ns, part.end_ns],
        "inputs_per_request": part.inputs_per_request,
        "offered": part.offered,
        "values": values,
        "quality": quality and dict(quality),
        "records": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }
    write(output / "runs" / measurement.run.name / DONE, document)


def restore(output: Path, order: Sequence[Run], into: Sequence[Outcome]) -> int:
    """Fill `into` with the complete runs of `order`, throw the others away, end what a killed bench left running; returns how many are complete."""
    for pid in leftovers(output):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    named = {outcome.subject.name: outcome for outcome in into}
    done = 0
    for run in order:
        folder = output / "runs" / run.name
        found = _restored(output, folder, run)
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        measurement, check = found
        outcome = named[run.configuration]
        outcome.measurements.append(measurement)
        if run.repeat == 0:
            outcome.quality = check or quality.unchecked("the check was interrupted")
            outcome.check_done = bool(check)
        done += 1
    return done


def _restored(output: Path, folder: Path, run: Run) -> tuple[Measurement, dict[str, Any] | None] | None:
    try:
        document = json.loads((folder / DONE).read_text(encoding="utf-8"))
        place = output / document["folder"]
        whole = all(
            hashlib.sha256((place / name).read_bytes()).hexdigest() == digest
            for name, digest in document["records"].items()
        )
        if document["schema"] != SCHEMA or document["run"] != dataclasses.asdict(run) or not whole:
            return None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    start, end = document["window"]
    part = summary.Part(
        generator.read_records(place, document["values"]["state"]),
        start,
        end,
        document["inputs_per_request"],
        document["offered"],
    )
    return Measurement(run=run, part=part, folder=place, **document["values"]), document["quality"]


def leftovers(output: Path) -> list[int]:
    """Leaders of process groups that a killed bench started in `output` and that still run: its server, its load generator, its reference."""
    runs = (output / "runs").resolve()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or not (entry / "cwd").readlink().is_relative_to(runs):
                continue
            words = (entry / "cmdline").read_bytes().split(b"\0")
            leads = os.getpgid(int(entry.name)) == int(entry.name)
        except OSError:
            continue
        # Somebody may have a shell or a pager in that folder.
        if leads and not {b"--announce", b"locust", quality.PROGRAM.encode()}.isdisjoint(words):
            found.append(int(entry.name))
    return found


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` atomically."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(document, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    part.rename(path)
