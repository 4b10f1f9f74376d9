"""Starts the real PostgreSQL and NATS, and makes usage events, for the tests of this folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from inferctl.tenancy.metering import usage_event
from inferctl.tenancy.metering.outbox import EventBatch
from inferctl.tenancy.metering.usage_event import Item, Origin, UsageEvent
from tests.processes import execute, free_port, until

ORIGIN = Origin("minilm", "embed", "ab" * 32, "l4")
DAY = 1_790_000_000.0  # 2026-09-21T14:13:20Z


def event(key_id: str | None = "k1", tokens: int = 10, status: int = 200, **fields: object) -> UsageEvent:
    code = None if status < 400 else "queue_full"
    values = {"code": code, "key_id": key_id, "input_tokens": tokens, "engine_seconds": 0.002, "inputs": 1}
    given: dict[str, Any] = {"endpoint": "embeddings", **values, **fields}
    return UsageEvent("request", status=status, **given)


def batch(
    source: str,
    first: int,
    last: int,
    *,
    lost: Sequence[int] = (),
    oldest: int = 1,
    at: float = DAY,
    key: str | None = "k1",
) -> EventBatch:
    """A batch of the numbers from `first` to `last`, without those that are `lost`."""
    numbers = [number for number in range(first, last + 1) if number not in lost]
    return batch_of(source, [Item(number, at, event(key)) for number in numbers], first, last, oldest=oldest)


def batch_of(
    source: str,
    items: Sequence[Item],
    first: int | None = None,
    last: int | None = None,
    *,
    oldest: int = 1,
    origins: Mapping[str, Origin] = {},
) -> EventBatch:
    """A batch of these events, which covers their numbers, or those from `first` to `last`."""
    content = json.dumps(usage_event.requests(ORIGIN, items, origins)).encode()
    time_ms = int(1000 * items[0].at)
    return EventBatch(source, first or items[0].number, last or items[-1].number, time_ms, content, oldest)


def end(source: str, first: int, number: int, *, clean: bool) -> EventBatch:
    time_ms = int(1000 * DAY)
    return EventBatch(source, first, number, time_ms, usage_event.end(number, time_ms, clean=clean), 1)


def _stopped(pid: int) -> bool:
    """Return whether no thread of a process runs any more: after SIGSTOP, one may still answer on a busy machine."""
    stats = []
    for file in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread ended
            stats.append(file.read_text())
    return all(stat.rpartition(")")[2].split()[0] in "TZX" for stat in stats)


@dataclass
class Part:
    """A process that a test starts, stops and kills."""

    command: list[str]
    user: str | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=self.user, start_new_session=True
        )

    def signal(self, number: int) -> None:
        """Send a signal to the process and its children. Those of PostgreSQL are in groups of their own."""
        assert self.process
        pid = self.process.pid
        for each in (pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, number)
                if number == signal.SIGSTOP:
                    until(partial(_stopped, each))

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()


class Postgres(Part):
    """PostgreSQL on a Unix socket. `url`: of an empty database."""

    def __init__(self, folder: Path) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        user = "postgres" if os.geteuid() == 0 else None
        folder.mkdir()
        folder.chmod(0o777)
        self._psql = [f"{programs}/psql", "-h", str(folder), "-U", "postgres", "-q"]
        data = folder / "data"
        initdb = [f"{programs}/initdb", "-D", str(data), "-A", "trust", "-U", "postgres", "-N"]
        _open_for_others(folder)
        subprocess.run(initdb, user=user, check=True, capture_output=True)
        options = ["-c", "listen_addresses=", "-k", str(folder), "-c", "fsync=off"]
        super().__init__([f"{programs}/postgres", "-D", str(data), *options], user)
        self._folder, self._count = folder, 0

    def start(self) -> None:
        _open_for_others(self._folder)
        super().start()
        until(lambda: not execute(*self._psql, "-c", "select 1").returncode)

    def url(self) -> str:
        self._count += 1
        subprocess.run([*self._psql, "-c", f"create database usage{self._count}"], check=True)
        return f"postgresql://postgres@/usage{self._count}?host={self._folder}"


def _open_for_others(folder: Path) -> None:
    """Let the user postgres reach `folder`. pytest closes its folders to others again and again."""
    for parent in folder.parents:
        if parent.owner() == "root" and parent not in (Path("/"), Path("/tmp")):
            parent.chmod(parent.stat().st_mode | 0o711)


class Nats(Part):
    """A NATS server with JetStream that forgets nothing by itself."""

    def __init__(self, folder: Path) -> None:
        self._port = free_port()
        folder.mkdir()
        self.store, self.url = folder / "js", f"nats://127.0.0.1:{self._port}"
        config = folder / "n.conf"
        store = f'jetstream {{ store_dir: "{self.store}", sync_interval: always, max_file_store: 512MB }}'
        config.write_text(f"listen: 127.0.0.1:{self._port}\n{store}\n")
        super().__init__(["nats-server", "-c", str(config)])

    def start(self) -> None:
        super().start()

        def listens() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", self._port)) == 0

        until(listens)

    def wipe(self) -> None:
        shutil.rmtree(self.store, ignore_errors=True)
