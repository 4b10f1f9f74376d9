"""The exact records that the load generator wrote, one row a request; the fields are documented in benchmarks/loadgen/recorder.py.

A records file is a line of magic, a line of JSON that names the fields, then fixed-size little-endian records. While it is being written,
and when its writer was killed, zeros follow the last record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inferctl.errors import InferctlError

MAGIC = b"inferctl-requests-1\n"
WARMUP, MEASURED = 0, 1
OK, HTTP_ERROR, TIMEOUT, CONNECTION, DROPPED = range(5)
ERROR_NAMES = {HTTP_ERROR: "HTTP status", TIMEOUT: "timeout", CONNECTION: "connection", DROPPED: "dropped"}

Rows = npt.NDArray[Any]


def read(path: Path) -> Rows:
    """Records of one worker, shape (n,), a structured array. What is not a whole record at the end is left out.

    Raises `InferctlError` when the file is not a records file.
    """
    with path.open("rb") as stream:
        if stream.readline() != MAGIC:
            raise InferctlError(
                f"{path} is not a records file", "it should be requests-N.bin, as `inferctl bench` writes it"
            )
        header = json.loads(stream.readline())
        kind = np.dtype([(name, code) for name, code in header["fields"]])
        content = stream.read()
    return _written(np.frombuffer(content, kind, count=len(content) // kind.itemsize))


def merge(folder: Path, offsets_ns: Mapping[int, int] | None = None) -> Rows:
    """Records of all workers in `folder`, by the time at which they should have left. Raises `InferctlError` when there is none.

    `offsets_ns`: what to take from the times of a worker (by number) whose clock is another machine's.
    """
    parts = [_shifted(read(path), (offsets_ns or {}).get(number_of(path), 0)) for path in files(folder)]
    if not parts:
        raise InferctlError(
            f"there are no records in {folder}", "the load generator wrote nothing: see locust.log there"
        )
    rows = np.concatenate(parts)
    return rows[np.argsort(rows["intended_ns"], kind="stable")]


def files(folder: Path) -> list[Path]:
    """Records files in `folder`, by the number of their worker."""
    return sorted(folder.glob("requests-*.bin"), key=number_of)


def number_of(path: Path) -> int:
    """The worker that wrote a records file."""
    return int(path.stem.rpartition("-")[2])


def _shifted(rows: Rows, offset_ns: int) -> Rows:
    if not offset_ns:
        return rows
    moved = rows.copy()
    for name in ("intended_ns", "sent_ns", "first_ns", "end_ns"):
        # 0 means that there is no such time.
        moved[name] = np.where(rows[name] == 0, 0, rows[name].astype(np.int64) - offset_ns)
    return moved


def _written(rows: Rows) -> Rows:
    """Without the empty records at the end of a file that was not closed."""
    empty = np.flatnonzero(rows["end_ns"] == 0)
    written: Rows = rows[: empty[0]] if len(empty) else rows
    return written


def latency_ms(rows: Rows) -> npt.NDArray[np.float64]:
    """Milliseconds from the intended send to the end of the answer, shape (n,)."""
    return (rows["end_ns"].astype(np.int64) - rows["intended_ns"].astype(np.int64)) / 1e6


class Tail:
    """Follows a records file while it is being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._kind: np.dtype[Any] | None = None

    def new(self) -> Rows:
        """Records that came since the last call; empty while the file is not there yet."""
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
        rows = _written(np.frombuffer(content, self._kind, count=len(content) // self._kind.itemsize))
        self._offset += len(rows) * self._kind.itemsize
        return rows
