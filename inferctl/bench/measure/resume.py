"""What a benchmark writes so that it can be resumed after an interruption, and how it is read back.

    write_manifest   bench.json: plan, targets, and all that the figures depend on (identity); sealed
    save             runs/NAME/run.json: a complete run with the sha256 of its records; written atomically, and
                     again with the quality check that follows the run
    restore          a run without run.json, or with other records than run.json names, is deleted and repeated

A folder belongs to one benchmark at a time: a lock ends with its process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pydantic

import inferctl
from inferctl.bench.judge import summary
from inferctl.bench.load import records
from inferctl.bench.measure import digests, quality
from inferctl.bench.measure.concurrency import Concurrency
from inferctl.bench.measure.environment import Environment
from inferctl.bench.measure.outcome import BenchTarget, Measurement, NeighborLoad, Outcome, WorkloadRecord
from inferctl.bench.measure.quality import QualityResult
from inferctl.bench.measure.telemetry import Telemetry
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Plan, Run
from inferctl.bench.plan.shape import Load
from inferctl.core import assets, outputs
from inferctl.core.errors import NotReadyError, UsageError
from inferctl.models import reference_process
from inferctl.receipts import receipt

SCHEMA = "inferctl.run/1"
MANIFEST, RUN_FILE = "bench.json", "run.json"
# Each key of `identity`, in words.
_NAMES = {
    "plan": "the plan",
    "plan_file": "the plan file",
    "subjects": "the benchmark targets",
    "corpora": "a corpus",
    "traces": "a trace",
    "model": "the weights of the model",
    "checkpoints": "a checkpoint",
    "spec": "the settings",
    "code": "the code of inferctl",
    "machine": "the machine or its software",
    "servers": "the weights or the precision of a server",
}
# Fields of a measurement that are plain data, and those that are a measurement.
_VALUES = ("started", "state", "resources", "info", "serial", "pace", "search", "capacity_rps")
_PARTS = ("with_neighbors", "closed_loop")

T = TypeVar("T")


def identity(
    plan: Plan,
    targets: Sequence[BenchTarget],
    environment: Environment,
    model_sha256: str | None,
    checkpoints: Mapping[str, str],
    spec_sha256: str | None,
    servers: Mapping[str, Any],
    plan_file: str | None,
) -> dict[str, Any]:
    """Return all that the figures of a benchmark depend on. Runs of different identities must not be pooled.

    `checkpoints` has the digest of the checkpoint of each target that has one, by its name.

    Raises `UsageError` if a corpus or a trace cannot be read.
    """
    corpora = {
        plan.corpus,
        *(target.corpus for target in targets if target.corpus),
        *([plan.quality.corpus] if plan.quality else []),
    }
    traces = {plan.load.trace, *((target.load or {}).get("trace") for target in targets)}
    file = Path(plan_file) if plan_file else None
    return {
        "plan": plan.model_dump(mode="json"),
        "plan_file": digests.of_file(file) if file and file.is_file() else None,
        # The key has an older word for targets: benchmarks with it can be resumed.
        "subjects": [dataclasses.asdict(target) for target in targets],
        "corpora": {name: workload.read_corpus(name)[1] for name in sorted(corpora)},
        "traces": {name: _trace_sha256(name) for name in sorted(filter(None, traces))},
        "model": model_sha256,
        "checkpoints": dict(checkpoints),
        "spec": spec_sha256,
        "code": {"version": inferctl.__version__, "sha256": assets.code_digest()},
        "machine": _machine(environment),
        "servers": dict(servers),
    }


def _machine(environment: Environment) -> dict[str, Any]:
    """Return hardware, system and software of the machine. One level, so that an error can name the difference."""
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
        return digests.of_file(Path(name))
    except OSError as error:
        raise UsageError(
            f"the trace {name} cannot be read: {error.strerror}",
            "the path in the plan is relative to the current folder",
        ) from None


@dataclass(frozen=True)
class Manifest:
    """The identity of a benchmark, and the options of its command."""

    identity: Mapping[str, Any]
    original_options: Mapping[str, Any]


def write_manifest(output: Path, manifest: Manifest) -> None:
    """Write the manifest of a benchmark before its first run."""
    plain = {
        "schema": SCHEMA,
        "created": time.time(),
        "identity": dict(manifest.identity),
        "called": dict(manifest.original_options),
    }
    document = json.loads(receipt.canonical(plain))
    write(output / MANIFEST, {**document, "seal": receipt.seal_of(document)})


def read_manifest(output: Path) -> Manifest:
    """Return the manifest of the benchmark in `output`. Raises `UsageError` if there is none, or if it was changed."""
    file = output / MANIFEST
    hint = "give the folder that `inferctl bench` created, such as `bench-results/precision-20260102-030405`"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{output} has no benchmark to resume: {MANIFEST} not found", hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {file}: {error}", hint) from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UsageError(f"{file} is not a manifest of this version", "start a new benchmark")
    if document.get("seal") != receipt.seal_of(document):
        raise UsageError(f"{file} was changed after the benchmark started", "start a new benchmark")
    return Manifest(document["identity"], document["called"])


def check_unchanged(saved: Mapping[str, Any], current: Mapping[str, Any], output: Path) -> None:
    """Raise `UsageError` with all differences between two `identity` documents."""
    plain = json.loads(receipt.canonical(dict(current)))
    # A plan file that was deleted has not changed: the manifest contains the plan.
    changed = [
        key for key in _NAMES if plain.get(key) != saved.get(key) and not (key == "plan_file" and not plain[key])
    ]
    if changed:
        differences = "; ".join(f"{_NAMES[key]} {_difference(saved.get(key), plain.get(key))}" for key in changed)
        raise UsageError(
            f"cannot resume {output}: these inputs changed: {differences}",
            "restore them, or start a new benchmark",
        )


def _difference(saved: Any, current: Any) -> str:
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = [key for key in {**saved, **current} if saved.get(key) != current.get(key)]
        pairs = ", ".join(f"{key}: {_short(saved.get(key))} -> {_short(current.get(key))}" for key in keys[:3])
        return f"changed ({pairs})"
    return f"changed ({_short(saved)} -> {_short(current)})"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


@contextlib.contextmanager
def lock(output: Path) -> Iterator[None]:
    """Lock the folder for this process. Raises `NotReadyError` if another benchmark has locked it.

    The lock ends with the process, also if the process is killed.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(output / ".lock", flags, 0o666), "wb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise NotReadyError(
                f"another benchmark runs in {output}", "wait until it ends, or interrupt it first"
            ) from None
        yield


def save(output: Path, measurement: Measurement, check: QualityResult | None) -> None:
    """Write a complete run atomically. `check` is its quality check; None if the check is not complete."""
    document = _document(output, measurement) | {"schema": SCHEMA, "quality": check and check.as_dict()}
    write(output / "runs" / measurement.run.name / RUN_FILE, document)


def _document(output: Path, measurement: Measurement) -> dict[str, Any]:
    """Return the JSON form of a measurement and its parts, with the sha256 of their records."""
    records = measurement.records
    return {
        "run": dataclasses.asdict(measurement.run),
        "folder": measurement.folder.relative_to(output).as_posix(),
        "window": [records.start_ns, records.end_ns],
        "inputs_per_request": records.inputs_per_request,
        "offered": records.offered,
        "records": digests.of_records(measurement.folder),
        "values": {name: getattr(measurement, name) for name in _VALUES},
        "telemetry": measurement.telemetry.as_dict(),
        "load": measurement.load and measurement.load.model_dump(mode="json"),
        "workload": dataclasses.asdict(measurement.workload),
        "concurrency": measurement.concurrency and measurement.concurrency.as_dict(),
        "neighbors": [dataclasses.asdict(neighbor) for neighbor in measurement.neighbors],
        "pooled": [_document(output, earlier) for earlier in measurement.pooled],
        **{name: (part := getattr(measurement, name)) and _document(output, part) for name in _PARTS},
    }


def _restored(output: Path, document: Mapping[str, Any]) -> Measurement:
    """Return the measurement that `_document` describes. Raises `ValueError` if its records have changed."""
    folder = output / document["folder"]
    if any(digests.of_file(folder / name) != digest for name, digest in document["records"].items()):
        raise ValueError("the records have changed")
    rows = records.merge(folder)
    start_ns, end_ns = document["window"]
    parts: dict[str, Any] = {name: document[name] and _restored(output, document[name]) for name in _PARTS}
    load = document["load"] and Load.model_validate(document["load"])
    return Measurement(
        run=Run(**document["run"]),
        records=summary.RunRecords(
            rows,
            start_ns,
            end_ns,
            document["inputs_per_request"],
            document["offered"],
            records.merge_events(folder),
            load.generation.bounds if load and load.generation else {},
        ),
        folder=folder,
        telemetry=_decoded(Telemetry, document["telemetry"]),
        load=load,
        workload=WorkloadRecord(**document["workload"]),
        concurrency=document["concurrency"] and Concurrency.from_dict(document["concurrency"]),
        neighbors=[NeighborLoad(**neighbor) for neighbor in document["neighbors"]],
        pooled=[_restored(output, earlier) for earlier in document["pooled"]],
        **parts,
        **document["values"],
    )


def restore(output: Path, order: Sequence[Run], outcomes: Sequence[Outcome]) -> int:
    """Add the complete runs of `order` to `outcomes`, and return their number.

    Other runs are deleted. Processes that a killed benchmark left running are killed.
    """
    for pid in orphaned_processes(output):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    by_name = {outcome.target.name: outcome for outcome in outcomes}
    complete = 0
    for run in order:
        folder = output / "runs" / run.name
        try:
            document = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
            if document["schema"] != SCHEMA or document["run"] != dataclasses.asdict(run):
                raise ValueError(f"{folder} has another run")
            measurement = _restored(output, document)
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        check = document["quality"] and _decoded(QualityResult, document["quality"])
        outcome = by_name[run.configuration]
        outcome.measurements.append(measurement)
        if run.repeat == 0:
            outcome.quality = check or quality.unchecked("the check was interrupted")
            outcome.check_done = check is not None
        complete += 1
    return complete


def _decoded(kind: type[T], data: object) -> T:
    return pydantic.TypeAdapter(kind).validate_python(data)


def orphaned_processes(output: Path) -> list[int]:
    """Return the leaders of process groups that a killed benchmark in `output` left running.

    They are its server, its load generator and its fp32 reference.
    """
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
        # A user may have a shell or a pager in that folder.
        if leads and not {b"--announce", b"locust", reference_process.PROGRAM.encode()}.isdisjoint(words):
            found.append(int(entry.name))
    return found


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` as JSON, atomically."""
    outputs.replace(path, json.dumps(document, indent=1) + "\n")
