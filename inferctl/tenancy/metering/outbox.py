"""The outbox: the events of one server process on disk, until the ledger has them.

    <data>/instance                 name of this data folder in the `source` of events
    <data>/<boot>/lock              locked by the server process; its 8 bytes count the numbers given to events
    <data>/<boot>/events.sqlite     one row per batch of events: the numbers it covers, and JSON
    <data>/<boot>/watermark         written by the relay: the ledger has all events up to this number

Up to 3.51.2, SQLite can corrupt a database in WAL mode if two connections write or checkpoint at the same moment. So
one thread of the server process has the only connection that writes, and readers open the file with `mode=ro`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import secrets
import shutil
import socket
import sqlite3
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferctl.core import outputs
from inferctl.core.errors import NotReadyError
from inferctl.core.partials import partial_file
from inferctl.tenancy.metering import usage_event
from inferctl.tenancy.metering.usage_event import Event

_LOCK, _EVENTS, _WATERMARK, _INSTANCE = "lock", "events.sqlite", "watermark", "instance"
_REMOVED, _DAMAGED = ".removed", ".damaged"
_MAX_NUMBER = 2**62
_OPEN = 1  # SQLite's `user_version` of a file with the table
_BUSY_S = 0.2
_WAL_BYTES = 16 * 1024 * 1024
# A batch has up to 200 events. A larger one was not written by a server, and would only fill the memory of the relay.
_MAX_BATCH_BYTES = 8 * 1024 * 1024
# What may pass: a lock, a full disk. The others may be a matter of permissions; if they are not, the file is damaged.
_LATER = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_IOERR}
_DENIED = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY}


@dataclass(frozen=True)
class EventBatch:
    """Events in the order of their numbers. `content`: as `usage_event.read` reads it.

    The batch covers all numbers from `first` to `last`. A number without an event is that of a lost one.
    `time_ms`: of the first event. `oldest`: the lowest number that the outbox still has.
    """

    source: str
    first: int
    last: int
    time_ms: int
    content: bytes
    oldest: int = 1

    @functools.cached_property
    def events(self) -> list[Event]:
        """The events in `content`. Raises `ValueError` for anything else, and for numbers that no server gives."""
        if not (0 < self.first <= self.last < _MAX_NUMBER and 0 <= self.time_ms < _MAX_NUMBER):
            raise ValueError(f"the numbers {self.first} to {self.last} at {self.time_ms}")
        return usage_event.read(self.content, self.first, self.last)


class Outbox:
    """The writing side of an outbox. `source`: that of its events. `watermark`: the ledger has the events up to it.

    One thread calls all methods. Only `issue` belongs to the thread that gives numbers to events.
    """

    def __init__(self, folder: Path, source: str, lock: int, max_bytes: int | None) -> None:
        self.source, self.watermark = source, 0
        self._folder, self._lock = folder, lock
        self._map = mmap.mmap(lock, 8)
        self._issued = memoryview(self._map).cast("Q")
        self._max_bytes = max_bytes
        self._connection: sqlite3.Connection | None = None
        self._watermark_id: tuple[int, int] | None = None

    @classmethod
    def create(cls, data: Path, max_bytes: int) -> Outbox:
        """Make the outbox of this process in the folder `data`. Raises `NotReadyError`."""
        boot = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        folder = data / boot
        try:
            data.mkdir(parents=True, exist_ok=True)
            source = f"{instance(data)}/{boot}"
            folder.mkdir(mode=0o700)
            # Written, not only extended: a page without a block would end the process if the disk is full.
            lock = os.open(folder / f"{_LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.write(lock, bytes(8))
            os.fsync(lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # A relay that sees the file also sees the lock.
            (folder / f"{_LOCK}.new").rename(folder / _LOCK)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise NotReadyError(
                f"the outbox in {data} cannot be made: {reason}", "set metering.data to a folder that can be written"
            ) from None
        return cls(folder, source, lock, max_bytes)

    def issue(self, number: int) -> None:
        """Note that `number` was given to an event. This survives a SIGKILL, so the ledger can tell what it lost."""
        self._issued[0] = number

    def append(self, first: int, last: int, time_ms: int, content: bytes) -> None:
        """Write a batch. Raises `sqlite3.Error`; then nothing of it is written."""
        self._connected().execute("insert into batches values (?, ?, ?, ?)", (first, last, time_ms, content))

    def free(self) -> bool:
        """Delete what the ledger has, and return whether anything changed. Raises `sqlite3.Error`."""
        found = _stat(self._folder / _WATERMARK)
        if found is None or found == self._watermark_id:
            return False
        watermark = read_watermark(self._folder)
        if watermark > self.watermark:
            self._connected().execute("delete from batches where last <= ?", (watermark,))
            self.watermark = watermark
        self._watermark_id = found
        return True

    def used(self) -> float:
        """Return the used share of the size. Raises `sqlite3.Error`."""
        connection = self._connected()
        pages, free, most = (
            connection.execute(f"pragma {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "max_page_count")
        )
        return float((pages - free) / most)

    def oldest_ms(self) -> int | None:
        """Return the time of the oldest batch (ms since 1970); None without one. Raises `sqlite3.Error`."""
        row = self._connected().execute("select time from batches order by first limit 1").fetchone()
        return None if row is None else int(row[0])

    def end(self, covered: int) -> None:
        """Write the event of a clean end, with the next number. Raises `sqlite3.Error`.

        `covered`: the last number of the batches.
        """
        number, now_ms = max(self._issued[0], covered) + 1, int(1000 * time.time())
        self.append(covered + 1, number, now_ms, usage_event.end(number, now_ms, clean=True))

    def close(self) -> None:
        """Close the file, and release the lock."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
        self._issued.release()
        self._map.close()
        os.close(self._lock)

    def _connected(self) -> sqlite3.Connection:
        """Return the only connection that writes."""
        if self._connection is None:
            connection = sqlite3.connect(
                self._folder / _EVENTS, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            try:
                # FULL: a batch is on disk when the commit returns, also after a power failure.
                for pragma in ("journal_mode = wal", "synchronous = full", "secure_delete = off"):
                    connection.execute(f"pragma {pragma}")
                connection.execute(f"pragma journal_size_limit = {_WAL_BYTES}")
                if self._max_bytes is not None:
                    (page_bytes,) = connection.execute("pragma page_size").fetchone()
                    connection.execute(f"pragma max_page_count = {max(8, self._max_bytes // page_bytes)}")
                connection.execute(
                    "create table if not exists batches "
                    "(first integer primary key, last integer not null, time integer not null, content blob not null)"
                )
                if connection.execute("pragma user_version").fetchone()[0] == 0:
                    connection.execute(f"pragma user_version = {_OPEN}")
            except sqlite3.Error:
                connection.close()
                raise
            self._connection = connection
        return self._connection


class OutboxReader:
    """Reads an outbox, also one that a server process writes. It cannot change that one.

    `source`: that of its events. `issued`: how many numbers the process gave to events; None if it still runs.
    `damage`: what was found that can never be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, f"{instance(folder.parent)}/{folder.name}"
        self.issued: int | None = None
        self.damage: str | None = None
        self._lock: int | None = None
        self._connection: sqlite3.Connection | None = None

    def take_over(self) -> bool:
        """Lock the outbox if its process ended. Return whether this reader has the lock. Raises `OSError`."""
        if self._lock is None:
            lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                content = os.pread(lock, 8, 0)
            except OSError as error:
                os.close(lock)
                if isinstance(error, BlockingIOError):
                    return False
                raise
            self.close()  # from now on, this process alone has the file, and may recover its journal
            issued = int.from_bytes(content, sys.byteorder)
            self._lock, self.issued = lock, issued if len(content) == 8 and issued < _MAX_NUMBER - 1 else 0
        return True

    def read(self, after: int, limit: int) -> list[EventBatch]:
        """Return up to `limit` batches with numbers above `after`, in order, without those that are damaged.

        Raises `OSError` or `sqlite3.Error` if they cannot be read now.
        """
        found: list[EventBatch] = []
        expected = after + 1
        try:
            for first, last, time_ms, content, oldest in self._rows(after):
                # The ledger does not wait for what is not there.
                batch = EventBatch(self.source, first, last, time_ms, content, first if first > expected else oldest)
                if not self._is_valid(batch):
                    self.damage = f"the batch {first!r} to {last!r} is not one of a server"
                    continue
                if self.issued is not None and not batch.events[-1].ended:
                    self.issued = max(self.issued, last)  # a power failure may leave an older content of the lock
                found.append(batch)
                expected = last + 1
                if len(found) == limit:
                    break
        except sqlite3.Error as error:
            self._close_file()
            code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
            if code in _LATER or (code in _DENIED and not self._is_accessible()):
                raise
            self.damage = str(error)
        return found

    def _is_valid(self, batch: EventBatch) -> bool:
        try:
            return batch.events[-1].id == batch.last
        except (IndexError, TypeError, ValueError):
            return False

    def _rows(self, after: int) -> Iterator[tuple[Any, ...]]:
        if self._connection is None:
            file = self.folder / _EVENTS
            try:
                regular = stat.S_ISREG(file.lstat().st_mode)
            except FileNotFoundError:
                return
            if not regular:  # SQLite would wait for a pipe
                self.damage = f"{_EVENTS} is not a file"
                return
            mode = "ro" if self._lock is None else "rw"
            self._connection = sqlite3.connect(
                f"{file.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=_BUSY_S,
                isolation_level=None,
                check_same_thread=False,
            )
        if self._connection.execute("pragma user_version").fetchone()[0]:  # otherwise the server has made no table yet
            yield from self._connection.execute(
                "select first, last, time, case when length(content) < ? then content end, "
                "(select min(first) from batches) from batches where last > ? order by first",
                (_MAX_BATCH_BYTES, after),
            )

    def _is_accessible(self) -> bool:
        return os.access(self.folder, os.R_OK | os.W_OK | os.X_OK) and os.access(self.folder / _EVENTS, os.R_OK)

    def remove(self) -> None:
        """Delete the files of an outbox that was taken over. If it is damaged, keep them. Raises `OSError`."""
        self._close_file()
        # First renamed, so that a crash in the middle leaves no outbox that lacks its events.
        self.folder.rename(self.folder.with_suffix(_DAMAGED if self.damage else _REMOVED))
        for removed in self.folder.parent.glob(f"*{_REMOVED}"):
            shutil.rmtree(removed, ignore_errors=True)

    def _close_file(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Close the file, and release the lock."""
        self._close_file()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def folders(data: Path) -> list[Path]:
    """Return the folders of all outboxes in `data`, in the order of their starts."""
    with contextlib.suppress(FileNotFoundError):
        found = (lock.parent for lock in data.glob(f"*/{_LOCK}"))
        return sorted(folder for folder in found if folder.suffix not in (_REMOVED, _DAMAGED))
    return []


def read_watermark(folder: Path) -> int:
    """Return what `write_watermark` wrote; 0 before that, and for anything else."""
    try:
        with os.fdopen(os.open(folder / _WATERMARK, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
            return int(file.read(20))
    except (OSError, ValueError):
        return 0


def write_watermark(folder: Path, watermark: int) -> None:
    """Tell the server process that the ledger has the events up to `watermark`. Raises `OSError`."""
    outputs.replace(folder / _WATERMARK, f"{watermark}\n", sync=False)


@contextlib.contextmanager
def exclusive(data: Path, name: str = "relay.lock") -> Iterator[bool]:
    """Yield whether this process alone has the lock `name` of `data`, until the end of the block. Raises `OSError`."""
    data.mkdir(parents=True, exist_ok=True)
    lock = os.open(data / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        yield alone
    finally:
        os.close(lock)


def instance(data: Path) -> str:
    """Return the name of a data folder, which is chosen once: the host that made it, and random digits."""
    file = data / _INSTANCE
    try:
        # A power failure may leave anything. The name of a boot is unique without it.
        return file.read_text(errors="backslashreplace").strip("\0\n ")
    except FileNotFoundError:
        with partial_file(file) as (partial, to):
            to.write(f"{socket.gethostname()}-{secrets.token_hex(4)}\n".encode())
            to.flush()
            with contextlib.suppress(FileExistsError):
                os.link(partial, file)  # unlike a rename, this does not replace the name that another process chose
        return instance(data)


def _stat(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
