"""Servers with the parts that `outages.py` stops: NATS, an outbox and PostgreSQL."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edge_cost
import peers

sys.path.insert(0, str(peers.ROOT))

from tests.metering.parts import Nats, Postgres

PORT = 18561
_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
connection.execute("begin exclusive")
print("locked", flush=True)
sys.stdin.read()
connection.execute("rollback")
"""


@dataclass
class Outage:
    """A server, and a part of it that stops for `seconds`.

    `begin` returns when it began (monotonic), `end` lets the part respond again. `noticed(metrics, sent)` is asked at
    the end of an outage in which `sent` requests were sent, `recovered(metrics, rate)` after it, until it is true.
    """

    server: peers.Server
    headers: dict[str, str]
    begin: Callable[[], float]
    end: Callable[[], object]
    seconds: float
    noticed: Callable[[dict[str, float], int], bool]
    recovered: Callable[[dict[str, float], float], bool]


def events_wait(metrics: dict[str, float], sent: int) -> bool:
    """Return whether the ledger lacks most of the events of `sent` requests."""
    return metrics["inferctl_outbox_events"] > 0.8 * sent


def events_arrive(metrics: dict[str, float], rate: float) -> bool:
    """Return whether the ledger lacks only the events of the last seconds."""
    return metrics["inferctl_outbox_events"] < 3 * rate


def at_once(action: Callable[[], object]) -> Callable[[], float]:
    """Return an action that returns when it began."""

    def begin() -> float:
        now = time.monotonic()
        action()
        return now

    return begin


def sections(folder: Path, **more: dict[str, Any]) -> dict[str, Any]:
    """Return the spec of a server with metering and a key file; `more` adds to its sections."""
    spec = {**edge_cost.metering(folder)[0], "access": {"open": ["metrics"]}}
    return spec | {name: {**spec.get(name, {}), **section} for name, section in more.items()}


@contextmanager
def broker(folder: Path, seconds: float, *, killed: bool) -> Iterator[Outage]:
    nats = Nats(folder / "nats")
    nats.start()
    limited, headers = edge_cost.keys(folder)
    shared = {**limited["access"], "broker": nats.url, "replicas": 2, "data": str(folder / "access")}
    try:
        server = edge_cost.start(folder, PORT, "broker", sections(folder, access=shared))
        begin = at_once(nats.kill if killed else lambda: nats.signal(signal.SIGSTOP))
        end = nats.start if killed else lambda: nats.signal(signal.SIGCONT)
        yield Outage(server, headers, begin, end, seconds, events_wait, events_arrive)
    finally:
        nats.kill()


@contextmanager
def outbox(folder: Path, seconds: float) -> Iterator[Outage]:
    limited, headers = edge_cost.keys(folder)
    server = edge_cost.start(folder, PORT, "outbox", sections(folder, **limited))
    lockers: list[subprocess.Popen[str]] = []

    def lock() -> float:
        (file,) = (folder / "metering").glob("*/events.sqlite")
        command = [sys.executable, "-c", _LOCK, str(file)]
        lockers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert lockers[-1].stdout and lockers[-1].stdout.readline() == "locked\n"
        return time.monotonic()

    def release() -> None:
        lockers[-1].communicate()

    try:
        yield Outage(server, headers, lock, release, seconds, events_wait, events_arrive)
    finally:
        for locker in lockers:
            locker.kill()


@contextmanager
def postgresql(folder: Path, seconds: float) -> Iterator[Outage]:
    postgres = Postgres(folder / "postgres")
    postgres.start()
    try:
        keys = postgres.url()
        headers = {"authorization": f"Bearer {peers.create_key(keys)}"}
        access = {"keys": keys, "data": str(folder / "access")}
        spec = sections(folder, access=access, metering={"ledger": postgres.url()})
        server = edge_cost.start(folder, PORT, "postgresql", spec)
        stop, go = (lambda: postgres.signal(signal.SIGSTOP)), (lambda: postgres.signal(signal.SIGCONT))
        yield Outage(server, headers, at_once(stop), go, seconds, events_wait, events_arrive)
    finally:
        postgres.kill()


OUTAGES: dict[str, Callable[[Path, float], Any]] = {
    "broker-stalled": lambda folder, seconds: broker(folder, seconds, killed=False),
    "broker-killed": lambda folder, seconds: broker(folder, seconds, killed=True),
    "outbox-locked": outbox,
    "postgresql-stalled": postgresql,
}
