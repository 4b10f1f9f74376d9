"""An open loop in a thread of its own that keeps a record of every request, and eyes on the server's processes. For the scripts on failure and overload."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

PAGE = os.sysconf("SC_PAGE_SIZE")
CONNECTIONS = 2000


@dataclass
class Record:
    """One request. Times are `time.monotonic()`; `status` 0: the connection broke, None: no answer until the end."""

    kind: str
    meant: float
    ended: float | None = None
    status: int | None = None
    retry_after: bool = False


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, free: list[_Connection]) -> None:
        self._free, self._buffer, self._missing, self.record = free, bytearray(), -1, None

    record: Record | None
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._free:
            self._free.remove(self)
        if self.record:
            self._answered(0)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._missing < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            lines = bytes(self._buffer[:end]).lower().split(b"\r\n")
            self._head = dict(line.split(b": ", 1) for line in lines[1:])
            self._status = int(lines[0][9:12])
            self._missing = end + 4 + int(self._head[b"content-length"])
        if len(self._buffer) >= self._missing:
            self._buffer.clear()
            self._missing = -1
            if self.record:
                self.record.retry_after = b"retry-after" in self._head
                self._answered(self._status)
            if self._head.get(b"connection") == b"close":
                self.transport.close()
            else:
                self._free.append(self)

    def _answered(self, status: int) -> None:
        assert self.record
        self.record.status, self.record.ended, self.record = status, time.monotonic(), None


@dataclass
class Load(threading.Thread):
    """`rate` requests a second at Poisson times, whatever the server does, until `stop()` or for `seconds`. Use as a context."""

    url: str
    ready: Sequence[tuple[str, bytes]]
    rate: float
    seconds: float = 3600.0
    seed: int = 1
    records: list[Record] = field(default_factory=list)
    latest: float = 0.0  # by how much the generator itself was late at most

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()

    def __hash__(self) -> int:
        return id(self)

    def __enter__(self) -> Load:
        self.began = time.monotonic()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send no more, wait up to 60 s for what is open."""
        self._over.set()
        self.join()

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        random_, free, due = random.Random(self.seed), [], self.began
        at, loop = urlsplit(self.url), asyncio.get_running_loop()
        everything: list[_Connection] = []
        while not self._over.is_set() and (due := due + random_.expovariate(self.rate)) < self.began + self.seconds:
            if (pause := due - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            self.latest = max(self.latest, time.monotonic() - due)
            kind, request = self.ready[random_.randrange(len(self.ready))]
            record = Record(kind, due)
            self.records.append(record)
            if not free:
                if len(everything) >= CONNECTIONS:
                    everything = [c for c in everything if not c.transport.is_closing()]
                try:
                    _, made = await loop.create_connection(lambda: _Connection(free), at.hostname, at.port)
                except OSError:
                    record.status, record.ended = 0, time.monotonic()
                    continue
                everything.append(made)
                free.append(made)
            connection = free.pop()
            connection.record = record
            connection.transport.write(request)
        until = time.monotonic() + 60
        while any(c.record for c in everything) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for connection in everything:
            connection.record = None
            connection.transport.close()


def statuses(records: Iterable[Record]) -> dict[str, int]:
    """How often each status came; `broken` connections and `unanswered` requests too."""
    names = {0: "broken", None: "unanswered"}
    return dict(sorted(Counter(names.get(record.status, str(record.status)) for record in records).items()))


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of what was seen; not a number without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def latencies(records: Iterable[Record]) -> list[float]:
    """Milliseconds of the answers with status 200, from the time that each was meant to be sent."""
    return [1000 * (record.ended - record.meant) for record in records if record.status == 200 and record.ended]


def engine(pid: int) -> int | None:
    """The engine's process, a child of the server's."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else None


def memory(pid: int | None) -> float:
    """Resident MiB of a process; not a number when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 2**20
    except (OSError, IndexError):
        return float("nan")


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares: by how much the second grows while the first grows by one."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
