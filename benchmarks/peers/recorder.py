"""An open loop in a thread, with a record of each request, and figures of processes."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from load import Connection

CONNECTIONS = 2000


@dataclass
class Record:
    """One request. Times are `time.monotonic()`. `status` is 0 if the connection broke, None without a response."""

    intended: float
    ended: float | None = None
    status: int | None = None


class _Connection(Connection):
    """A connection with the record of its request. It is in `free` while it has none."""

    def __init__(self, free: list[_Connection]) -> None:
        super().__init__()
        self._free, self.on_response = free, self._complete
        self.record: Record | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._free:
            self._free.remove(self)
        super().connection_lost(exc)

    def _complete(self, status: int) -> None:
        if self.record:
            self.record.status, self.record.ended, self.record = status, time.monotonic(), None
        if b"\r\nconnection: close" in self.head:
            self.transport.close()
        elif status:
            self._free.append(self)


@dataclass
class OpenLoop(threading.Thread):
    """Send `rate` requests/s with Poisson arrivals for `seconds`. At its end, the context waits for open requests."""

    url: str
    ready: Sequence[bytes]
    rate: float
    seconds: float
    seed: int = 1
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._stop_requested = threading.Event()

    def __hash__(self) -> int:
        return id(self)

    def __enter__(self) -> OpenLoop:
        self.start_s = time.monotonic()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_requested.set()
        self.join()

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        random_, free, due = random.Random(self.seed), [], self.start_s
        at, loop = urlsplit(self.url), asyncio.get_running_loop()
        connections: list[_Connection] = []
        while (
            not self._stop_requested.is_set()
            and (due := due + random_.expovariate(self.rate)) < self.start_s + self.seconds
        ):
            if (pause := due - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            request = self.ready[random_.randrange(len(self.ready))]
            record = Record(due)
            self.records.append(record)
            if not free:
                if len(connections) >= CONNECTIONS:
                    connections = [c for c in connections if not c.transport.is_closing()]
                try:
                    _, created = await loop.create_connection(lambda: _Connection(free), at.hostname, at.port)
                except OSError:
                    record.status, record.ended = 0, time.monotonic()
                    continue
                connections.append(created)
                free.append(created)
            connection = free.pop()
            connection.record = record
            connection.send(request)
        until = time.monotonic() + 60
        while any(c.record for c in connections) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for connection in connections:
            connection.record = None
            connection.transport.close()


def statuses(records: Iterable[Record]) -> dict[str, int]:
    """Return the number of requests by status; also of `broken` connections and `unanswered` requests."""
    names = {0: "broken", None: "unanswered"}
    return dict(sorted(Counter(names.get(record.status, str(record.status)) for record in records).items()))


def quantile(values: Sequence[float], q: float) -> float:
    """Return the q-quantile of the values; NaN without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def latencies(records: Iterable[Record]) -> list[float]:
    """Return the latencies (ms) of responses with status 200, from the intended send times."""
    return [1000 * (record.ended - record.intended) for record in records if record.status == 200 and record.ended]


def processes(pid: int) -> dict[str, int]:
    """Return the processes of a server by name, its own included."""
    found = {"server": pid}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            module = Path(f"/proc/{child}/cmdline").read_bytes().decode()
        except OSError:  # it has ended
            continue
        name = next((name for name in ("api_process", "relay") if name in module), "engine").replace("_", " ")
        found[name if name not in found else f"{name} {len(found)}"] = int(child)
    return found
