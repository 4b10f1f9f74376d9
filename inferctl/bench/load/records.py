"""Read the records of the load generator: one row per request and, for generation, one per event with tokens.

inferctl/bench/loadgen/recorder.py describes the fields. A file is a line of magic, a line of JSON that names the fields,
then fixed-size little-endian records. While the file is being written, and after its writer was killed, zeros follow
the last record.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inferctl.bench.loadgen import recorder
from inferctl.core.errors import InferctlError

MAGIC, EVENTS_MAGIC = recorder.MAGIC, recorder.EVENTS_MAGIC
WARMUP, MEASURED = recorder.WARMUP, recorder.MEASURED
OK, HTTP_ERROR, TIMEOUT, CONNECTION = recorder.OK, recorder.HTTP_ERROR, recorder.TIMEOUT, recorder.CONNECTION
DROPPED, UNFINISHED, STREAM_ERROR = recorder.DROPPED, recorder.UNFINISHED, recorder.STREAM_ERROR
# The name of an error in a receipt, by its code in a record.
ERROR_NAMES = {
    HTTP_ERROR: "HTTP status",
    TIMEOUT: "timeout",
    CONNECTION: "connection",
    DROPPED: "dropped",
    UNFINISHED: "unfinished stream",
    STREAM_ERROR: "error event",
}
# The key of a `finish_reason` in a receipt, by its code in a record.
FINISH_NAMES = ("none", "stop", "length", "other")
# `cached_tokens` of a response whose usage does not have them.
NOT_REPORTED = 2**32 - 1

# HTTP status of a rejected request: the server could not complete it in time. Not counted as a failure.
REJECTED = 429

Rows = npt.NDArray[Any]


def read(path: Path) -> Rows:
    """Return the records of one worker, a structured array of shape (n,), without an incomplete record at the end.

    Raises `InferctlError` if the file is not a records file.
    """
    with path.open("rb") as stream:
        if stream.readline() not in (MAGIC, EVENTS_MAGIC):
            raise InferctlError(
                f"{path} is not a records file", "pass a file requests-N.bin that `inferctl bench` wrote"
            )
        header = json.loads(stream.readline())
        kind = np.dtype([(name, code) for name, code in header["fields"]])
        content = stream.read()
    return _complete(np.frombuffer(content, kind, count=len(content) // kind.itemsize))


def merge(folder: Path) -> Rows:
    """Return the records of all workers in `folder`, sorted by the intended send time.

    Raises `InferctlError` if there are no records.
    """
    parts = [read(path) for path in files(folder)]
    if not parts:
        raise InferctlError(
            f"no records in {folder}", "the load generator wrote nothing: see locust.log in that folder"
        )
    rows = np.concatenate(parts)
    return rows[np.argsort(rows["intended_ns"], kind="stable")]


def merge_events(folder: Path) -> Rows | None:
    """Return the events of all workers in `folder`, sorted by their time; None if the load was not of generation."""
    parts = [read(path) for path in event_files(folder)]
    if not parts:
        return None
    events = np.concatenate(parts)
    ordered: Rows = events[np.argsort(events["time_ns"], kind="stable")]
    return ordered


def files(folder: Path) -> list[Path]:
    """Return the records files in `folder`, sorted by the number of their worker."""
    return sorted(folder.glob("requests-*.bin"), key=worker_of)


def event_files(folder: Path) -> list[Path]:
    """Return the files with events in `folder`, sorted by the number of their worker."""
    return sorted(folder.glob("events-*.bin"), key=worker_of)


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 (hex) of each file of records in `folder`, by file name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (*files(folder), *event_files(folder))}


def worker_of(path: Path) -> int:
    """Return the number of the worker that wrote a records file."""
    return int(path.stem.rpartition("-")[2])


def _complete(rows: Rows) -> Rows:
    """Return the rows without the empty ones at the end of a file that was not closed."""
    empty = np.flatnonzero(rows["end_ns" if "end_ns" in (rows.dtype.names or ()) else "time_ns"] == 0)
    complete: Rows = rows[: empty[0]] if len(empty) else rows
    return complete


def latency_ms(rows: Rows) -> npt.NDArray[np.float64]:
    """Return the milliseconds from the intended send time to the end of the response, shape (n,)."""
    return (rows["end_ns"].astype(np.int64) - rows["intended_ns"].astype(np.int64)) / 1e6


class Tail:
    """Read a records file while it is being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._kind: np.dtype[Any] | None = None

    def read_new(self) -> Rows:
        """Return the records since the last call; empty while the file does not exist."""
        if not self._path.is_file():
            return np.zeros(0, [("end_ns", "<u8")])
        with self._path.open("rb") as stream:
            if self._kind is None:
                head = stream.readline() + stream.readline()
                if not head.endswith(b"\n") or head.count(b"\n") < 2:
                    return np.zeros(0, [("end_ns", "<u8")])
                fields = json.loads(head.splitlines()[1])["fields"]
                self._kind, self._offset = np.dtype([(name, code) for name, code in fields]), len(head)
            stream.seek(self._offset)
            content = stream.read()
        rows = _complete(np.frombuffer(content, self._kind, count=len(content) // self._kind.itemsize))
        self._offset += len(rows) * self._kind.itemsize
        return rows
