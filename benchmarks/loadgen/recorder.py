"""One fixed-size record a request, written into a file that is mapped into memory.

A record is in the file as soon as it is packed, without a system call: whatever kills this process, the kernel keeps the page.
The file is longer than its records while it is open; what is not used yet is zeros, and no record has an `end_ns` of zero.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any

MAGIC = b"inferctl-requests-1\n"
# name, numpy type, struct code; the order is the order in the file.
FIELDS = (
    ("intended_ns", "<u8", "Q"),  # when it should have left; for a closed loop the same as sent_ns
    ("sent_ns", "<u8", "Q"),  # when it left; 0 when it was dropped
    ("first_ns", "<u8", "Q"),  # the first bytes of the answer are here
    ("end_ns", "<u8", "Q"),  # the whole answer is here, or the failure
    ("index", "<u4", "I"),  # n-th request of its phase
    ("bytes", "<u4", "I"),  # size of the answer's body
    ("tokens", "<u4", "I"),  # tokens the server counted; 0 when it does not say
    ("queue_ms", "<f4", "f"),  # the server's own figures; NaN when it does not say
    ("tokenize_ms", "<f4", "f"),
    ("inference_ms", "<f4", "f"),
    ("status", "<u2", "H"),  # HTTP status; 0 without an answer
    ("phase", "<u1", "B"),  # 0 warm-up, 1 measured
    ("error", "<u1", "B"),  # 0 none, 1 HTTP status, 2 timeout, 3 connection, 4 dropped: too many outstanding
)
PACKER = struct.Struct("<" + "".join(code for _, _, code in FIELDS))
WARMUP, MEASURED = 0, 1
OK, HTTP_ERROR, TIMEOUT, CONNECTION, DROPPED = range(5)
CHUNK = 4 * 1024 * 1024


class Recorder:
    """Appends records to `path`; `header` is written as JSON before the first one. Raises `OSError` when the disk is full."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        fields = {"fields": [[name, kind] for name, kind, _ in FIELDS], "clock": "CLOCK_MONOTONIC", **header}
        self.path = path
        self._file = path.open("w+b", buffering=0)
        self._file.write(MAGIC + json.dumps(fields).encode() + b"\n")
        self._start = self._next = self._file.tell()
        self._size = 0
        self._map = self._grown()

    def add(self, *values: float) -> None:
        """One value a field of `FIELDS`."""
        if self._next + PACKER.size > self._size:
            self._map.close()
            self._map = self._grown()
        PACKER.pack_into(self._map, self._next, *values)
        self._next += PACKER.size

    @property
    def count(self) -> int:
        return (self._next - self._start) // PACKER.size

    def since(self, offset: int) -> bytes:
        """Bytes of the file from `offset` on: header and records, for a copy elsewhere."""
        return bytes(self._map[offset : self._next])

    def close(self) -> None:
        """Cut the file to its records."""
        self._map.close()
        self._file.truncate(self._next)
        self._file.close()

    def _grown(self) -> mmap.mmap:
        if hasattr(os, "posix_fallocate"):
            # Reserved and not only lengthened: a full disk is then an error here, and not a signal at some later write.
            os.posix_fallocate(self._file.fileno(), self._size, CHUNK)
        else:
            self._file.truncate(self._size + CHUNK)
        self._size += CHUNK
        return mmap.mmap(self._file.fileno(), self._size)
