"""Starts the real PostgreSQL and NATS, and makes usage events, for the tests of this folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferctl.tenancy.metering import usage_event
from inferctl.tenancy.metering.outbox import EventBatch
from inferctl.tenancy.metering.usage_event import Item, Origin, UsageEvent

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
    content = json.dumps(usage_event.requests(ORIGIN, [Item(number, at, event(key)) for number in numbers])).encode()
    return EventBatch(source, first, last, int(1000 * at), content, oldest)


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
                deadline = time.monotonic() + 10
                while number == signal.SIGSTOP and not _stopped(each):
                    assert time.monotonic() < deadline, f"{each} does not stop"
                    time.sleep(0.01)

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
        for _ in range(300):
            if subprocess.run([*self._psql, "-c", "select 1"], capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError("PostgreSQL does not start")

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
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir()
        self.store, self.url = folder / "js", f"nats://127.0.0.1:{port}"
        config = folder / "n.conf"
        store = f'jetstream {{ store_dir: "{self.store}", sync_interval: always, max_file_store: 512MB }}'
        config.write_text(f"listen: 127.0.0.1:{port}\n{store}\n")
        super().__init__(["nats-server", "-c", str(config)])
        self._port = port

    def start(self) -> None:
        super().start()
        for _ in range(100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("NATS does not start")

    def wipe(self) -> None:
        shutil.rmtree(self.store, ignore_errors=True)
