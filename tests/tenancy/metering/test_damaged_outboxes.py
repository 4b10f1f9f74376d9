"""Outboxes of killed servers that are damaged, next to those of others, read by one real relay."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from inferctl.tenancy.metering import outbox
from inferctl.tenancy.metering.ledger import Ledger
from inferctl.tenancy.metering.outbox import Outbox
from inferctl.tenancy.metering.recorder import EventRecorder
from tests.processes import until
from tests.tenancy.parts import ORIGIN, batch, event

PAGE, SECOND = 4096, "where first = 201"


def sql(*statements: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        opened = sqlite3.connect(file, isolation_level=None)
        for statement in ("pragma wal_checkpoint(truncate)", *statements):
            opened.execute(statement)
        opened.close()

    return damage


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        sql()(file)
        file.write_bytes(change(file.read_bytes()))

    return damage


def without(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        for part in file.parent.glob(f"{file.name}*"):
            part.unlink()
        make(file)

    return damage


# Of 1000 events in five batches: how each outbox is damaged, and how many events are lost.
DAMAGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "none": (lambda _: None, 0),
    "truncated": (content(lambda found: found[: len(found) // 2]), 1000),
    "empty": (content(lambda _: b""), 1000),
    "zero-pages": (content(lambda found: found[: 2 * PAGE] + bytes(len(found) - 2 * PAGE)), 1000),
    "random-bytes": (content(lambda found: found[:PAGE] + random.Random(1).randbytes(len(found) - PAGE)), 1000),
    "not-a-database": (content(lambda _: b"hello " * 1000), 1000),
    "wrong-schema": (sql("drop table batches", "create table batches (a, b)"), 1000),
    "no-table": (sql("drop table batches"), 1000),
    "missing-column": (sql("alter table batches drop column content"), 1000),
    "folder": (without(lambda file: file.mkdir()), 1000),
    "pipe": (without(os.mkfifo), 1000),
    "absent": (without(lambda _: None), 1000),
    "wal-lost": (lambda file: file.with_name(f"{file.name}-wal").unlink(), 1000),
    "huge-batch": (sql(f"update batches set content = zeroblob(300000000) {SECOND}"), 200),
    "no-json": (sql(f"update batches set content = x'ff' {SECOND}"), 200),
    "wrong-type": (sql(f"update batches set time = 'now' {SECOND}"), 200),
    "wrong-numbers": (sql(f"update batches set last = {2**62 - 1} {SECOND}"), 200),
    "missing-batch": (sql(f"delete from batches {SECOND}"), 200),
    # A power failure keeps the batches, but maybe an older content of the lock.
    "lock-is-old": (lambda file: file.with_name("lock").write_bytes(bytes(8)), 0),
    "lock-is-wrong": (lambda file: file.with_name("lock").write_bytes(b"\xff" * 8), 0),
    "watermark-is-a-pipe": (lambda file: os.mkfifo(file.with_name("watermark")), 0),
    "watermark-is-wrong": (lambda file: file.with_name("watermark").write_text("9" * 15), 0),
}
# Its batches can be read, but not whether its process ended.
UNREADABLE = {"lock-is-a-folder": lambda folder: ((folder / "lock").unlink(), (folder / "lock").mkdir())}


def test_a_damaged_outbox_is_a_gap_and_delays_no_other_one(tmp_path: Path) -> None:
    data = tmp_path / "m"
    killed = Outbox.create(data, 1 << 24)
    for first in range(1, 1001, 200):
        killed.append(first, first + 199, 0, batch("", first, first + 199).content)
    killed.issue(1000)
    (folder,) = (path for path in data.iterdir() if path.is_dir())
    for name in (*DAMAGES, *UNREADABLE):
        shutil.copytree(folder, data / name)
    killed.close()
    shutil.rmtree(folder)
    (data / "instance").write_bytes(b"\xff\0\n")
    for name, (damage, _) in DAMAGES.items():
        damage(data / name / "events.sqlite")
    for name, damage_folder in UNREADABLE.items():
        damage_folder(data / name)
    live = EventRecorder(Outbox.create(data, 1 << 24), ORIGIN)
    live.record(event())
    url = f"sqlite:///{tmp_path}/ledger.sqlite"
    command = [sys.executable, "-m", "inferctl", "relay", "--data", str(data), "--ledger", url]
    with (tmp_path / "log").open("wb") as log:
        relay = subprocess.Popen(command, cwd=tmp_path, stderr=log)
    until(lambda: len(outbox.folders(data)) == 1 + len(UNREADABLE) or relay.poll() is not None, 120)
    live.record(event())
    assert live.close(10)
    until(lambda: len(outbox.folders(data)) == len(UNREADABLE) or relay.poll() is not None, 60)
    relay.send_signal(signal.SIGTERM)
    said = (tmp_path / "log").read_text
    assert relay.wait(60) == 0, said()
    assert "Traceback" not in said()
    ledger = Ledger.read(url)
    instance = outbox.instance(data)
    stored = {row["source"].removeprefix(f"{instance}/"): row["requests"] for row in ledger.usage(["source"], 0, 2**62)}
    gaps: dict[str, int] = {}
    for gap in ledger.gaps(0, 2**62):
        name = gap.source.removeprefix(f"{instance}/")
        gaps[name] = gaps.get(name, 0) + gap.last - gap.first + 1
    ends = {source.removeprefix(f"{instance}/") for source in ledger.unclean_ends(0, 2**62)}
    ledger.close()
    assert {name: gaps.get(name, 0) for name in DAMAGES} == {name: lost for name, (_, lost) in DAMAGES.items()}
    assert {name: stored.get(name, 0) for name in DAMAGES} == {name: 1000 - lost for name, (_, lost) in DAMAGES.items()}
    assert ends == set(DAMAGES)
    assert sorted(count for name, count in stored.items() if name not in DAMAGES) == [2, 1000], "live and unreadable"
    # What may still be of use stays.
    kept = {path.stem for path in data.glob("*.damaged")}
    assert kept == {name for name, (_, lost) in DAMAGES.items() if lost} - {
        "empty",
        "absent",
        "wal-lost",
        "missing-batch",
    }
