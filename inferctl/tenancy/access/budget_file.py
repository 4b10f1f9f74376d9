"""What a server process knows of budgets, on disk: a SIGKILL loses nothing of it. A power failure may.

<folder>/<name>.names     one line of JSON for each counter; locked by the process
<folder>/<name>.values    three integers for each line, in shared memory of the file
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_VALUES = struct.Struct("=qqq")
_GROWTH = 64 * 1024


class BudgetFile:
    """The file of this process. A counter is a line of JSON, and three integers."""

    def __init__(self, folder: Path) -> None:
        """Raises `OSError`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._base = folder / secrets.token_hex(8)
        self._values = os.open(self._base.with_suffix(".values"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = self._count = 0
        self._grow()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._names = os.open(self._base.with_suffix(".new"), flags, 0o600)
        fcntl.flock(self._names, fcntl.LOCK_EX)
        self._base.with_suffix(".new").rename(self._base.with_suffix(".names"))  # who sees it also sees the lock

    def add(self, name: list[Any]) -> int:
        """Add a counter, and return where its values are. Raises `OSError`."""
        if (self._count + 1) * _VALUES.size > self._size:
            self._grow()
        os.write(self._names, json.dumps(name).encode() + b"\n")
        self._count += 1
        return (self._count - 1) * _VALUES.size

    def write(self, place: int, reserved: int, spent: int, released: int) -> None:
        """Write values. In this order, a process that is killed in between counts too much, not too little."""
        _VALUES.pack_into(self._map, place, reserved, spent, released)

    def close(self) -> None:
        """Release the file, as the end of the process does."""
        os.close(self._names)
        os.close(self._values)

    def _grow(self) -> None:
        # Written, not only extended: a page without a block would end the process if the disk is full.
        os.pwrite(self._values, bytes(_GROWTH), self._size)
        self._size += _GROWTH
        self._map = mmap.mmap(self._values, self._size)


def take_over(folder: Path) -> Iterator[tuple[Path, list[tuple[list[Any], tuple[int, int, int]]]]]:
    """Yield the files of processes that ended, with their counters. They are deleted after the caller continues."""
    for names in sorted(folder.glob("*.names")):
        with contextlib.suppress(FileNotFoundError), names.open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield names, read(names)
            for file in (names, names.with_suffix(".values")):
                file.unlink(missing_ok=True)


def read(names: Path) -> list[tuple[list[Any], tuple[int, int, int]]]:
    """Return the counters of a file, also of one that is in use."""
    lines = names.read_bytes().split(b"\n")[:-1]  # the last line may be incomplete
    values = names.with_suffix(".values").read_bytes()
    return list(zip(map(json.loads, lines), _VALUES.iter_unpack(values[: len(lines) * _VALUES.size]), strict=True))
