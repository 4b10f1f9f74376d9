"""Write fixed-size records into a memory-mapped file: one per request and, for generation, one per event with tokens.

A record is in the file as soon as it is packed, without a system call: the kernel keeps the page if this process is
killed. While the file is open, it is longer than its records. Its unused part is zeros, and no record has an `end_ns`
of zero.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAGIC = b"inferctl-requests-1\n"
EVENTS_MAGIC = b"inferctl-events-1\n"
# name, numpy type, struct code; in the order of the file
Fields = tuple[tuple[str, str, str], ...]
FIELDS: Fields = (
    ("intended_ns", "<u8", "Q"),  # the intended send time; in a closed loop the same as sent_ns
    ("sent_ns", "<u8", "Q"),  # the send time; 0 if the request was dropped
    ("first_ns", "<u8", "Q"),  # when the first bytes of the response arrived
    ("end_ns", "<u8", "Q"),  # when the response was complete, or the request failed
    ("index", "<u4", "I"),  # number of the request in its phase, from 0
    ("bytes", "<u4", "I"),  # size of the response body
    ("tokens", "<u4", "I"),  # tokens that the server counted; 0 if it does not report them
    ("queue_ms", "<f4", "f"),  # times that the server reports; NaN if it does not
    ("tokenize_ms", "<f4", "f"),
    ("inference_ms", "<f4", "f"),
    ("status", "<u2", "H"),  # HTTP status; 0 without a response
    ("phase", "<u1", "B"),  # 0 warm-up, 1 measured
    # 0 none, 1 HTTP status, 2 timeout, 3 connection, 4 dropped: too many outstanding requests,
    # 5 unfinished: a stream without a finish reason or [DONE], 6 an error event in a stream
    ("error", "<u1", "B"),
    ("name", "<u2", "H"),  # number of the requested model or adapter in `names` of load.json, from 0
)
# What the records of generation have in addition, from the usage that the server reports; 0 if it reports none.
STREAM_FIELDS: Fields = (
    ("output_tokens", "<u4", "I"),
    ("cached_tokens", "<u4", "I"),  # tokens of the prompt that came from a cache; 2**32 - 1 if not reported
    ("finish", "<u1", "B"),  # 0 none, 1 stop, 2 length, 3 other
    ("counted", "<u1", "B"),  # 1 if usage came with each event, else an event counts as one token
)
# An event with tokens, of the request with this index and phase.
EVENT_FIELDS: Fields = (
    ("time_ns", "<u8", "Q"),  # when the bytes that completed the event were read
    ("index", "<u4", "I"),
    ("tokens", "<u2", "H"),
    ("phase", "<u1", "B"),
)
# Requests of the phase DRAIN have no records.
WARMUP, MEASURED, DRAIN = 0, 1, 2
OK, HTTP_ERROR, TIMEOUT, CONNECTION, DROPPED, UNFINISHED, STREAM_ERROR = range(7)
CHUNK = 4 * 1024 * 1024


@contextlib.contextmanager
def exit_on_write_error() -> Iterator[None]:
    """End this process if a file cannot be written, for example on a full disk. The exit code is the error's number.

    Locust and gevent log other exceptions and continue.
    """
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):  # the log may be on the same disk
            sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.errno) from error


class Recorder:
    """Append records with `fields` to `path`, after `magic` and `header` as JSON. Ends this process on a full disk."""

    def __init__(self, path: Path, header: dict[str, Any], fields: Fields = FIELDS, magic: bytes = MAGIC) -> None:
        names = {"fields": [[name, kind] for name, kind, _ in fields], "clock": "CLOCK_MONOTONIC", **header}
        self._packer = struct.Struct("<" + "".join(code for _, _, code in fields))
        with exit_on_write_error():
            self._file = path.open("w+b", buffering=0)
            self._file.write(magic + json.dumps(names).encode() + b"\n")
        self._start = self._next = self._file.tell()
        self._size = 0
        self._map = self._grow()

    def add(self, *values: float) -> None:
        """Append one record: one value per field, in order."""
        packer = self._packer
        if self._next + packer.size > self._size:
            self._map.close()
            self._map = self._grow()
        packer.pack_into(self._map, self._next, *values)
        self._next += packer.size

    @property
    def count(self) -> int:
        return (self._next - self._start) // self._packer.size

    def close(self) -> None:
        """Truncate the file after its last record and close it."""
        self._map.close()
        self._file.truncate(self._next)
        self._file.close()

    def _grow(self) -> mmap.mmap:
        with exit_on_write_error():
            # This reserves disk space. On a full disk it fails here, and not with SIGBUS at a later write.
            os.posix_fallocate(self._file.fileno(), self._size, CHUNK)
        self._size += CHUNK
        return mmap.mmap(self._file.fileno(), self._size)
