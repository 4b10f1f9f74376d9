"""What a server process spent and reserved, on disk: a SIGKILL loses nothing of it. A power failure may.

<folder>/<name>.counters    for each counter, three integers and its name in JSON; locked by the process
"""

from __future__ import annotations

import contextlib
import errno
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
_RECORD = 1024
_GROWTH = 64 * _RECORD

Counter = tuple[list[Any], tuple[int, int, int]]


class BudgetFile:
    """The file of this process, in shared memory."""

    def __init__(self, folder: Path) -> None:
        """Raises `OSError`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{secrets.token_hex(8)}.new"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size, self._free = 0, list[int]()
        self._grow()
        fcntl.flock(self._file, fcntl.LOCK_EX)
        path.rename(path.with_suffix(".counters"))  # who sees it also sees the lock

    def add(self, name: list[Any]) -> int:
        """Add a counter, and return its place. Raises `OSError`, and `ValueError` for a name of about 1,000 bytes."""
        record = bytes(_VALUES.size) + json.dumps(name, ensure_ascii=False).encode()
        if len(record) > _RECORD:
            raise ValueError("the name of a counter is too long")
        if not self._free:
            self._grow()
        place = self._free.pop()
        self._map[place : place + len(record)] = record
        return place

    def remove(self, place: int) -> None:
        """Remove a counter."""
        self._map[place : place + _RECORD] = bytes(_RECORD)
        self._free.append(place)

    def write(self, place: int, reserved: int, spent: int, released: int) -> None:
        """Write values. In this order, a process that is killed in between counts too much, not too little."""
        _VALUES.pack_into(self._map, place, reserved, spent, released)

    def close(self) -> None:
        """Release the file, as the end of the process does."""
        self._map.close()  # it has a descriptor of its own
        os.close(self._file)

    def _grow(self) -> None:
        # Written, not only extended: a page without a block would end the process if the disk is full.
        if os.pwrite(self._file, bytes(_GROWTH), self._size) < _GROWTH:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._free = list(range(self._size, self._size + _GROWTH, _RECORD))
        self._size += _GROWTH
        self._map = mmap.mmap(self._file, self._size)


def take_over(folder: Path) -> Iterator[Counter]:
    """Yield the counters of processes that ended. Their file is deleted after the last one."""
    for file in sorted(folder.glob("*.counters")):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), file.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield from _read(file)
            file.unlink(missing_ok=True)


def read_all(folder: Path) -> Iterator[Counter]:
    """Yield the counters of all processes, also of those that run."""
    for file in folder.glob("*.counters"):
        with contextlib.suppress(FileNotFoundError):  # another process took it over
            yield from _read(file)


def _read(file: Path) -> Iterator[Counter]:
    content = file.read_bytes()
    for place in range(0, len(content), _RECORD):
        if name := content[place + _VALUES.size : place + _RECORD].rstrip(b"\0"):
            with contextlib.suppress(ValueError):  # a SIGKILL while the name was written: nothing was counted yet
                yield json.loads(name), _VALUES.unpack_from(content, place)
