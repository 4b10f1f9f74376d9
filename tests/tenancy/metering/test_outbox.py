"""The outbox and its writer, with real files: what is written, what is lost, and that the ledger can tell."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferctl.tenancy.metering import outbox, usage_event
from inferctl.tenancy.metering import recorder as recorders
from inferctl.tenancy.metering.outbox import EventBatch, Outbox
from inferctl.tenancy.metering.outboxes import Outboxes
from inferctl.tenancy.metering.recorder import UNAVAILABLE, EventRecorder
from tests.processes import until
from tests.tenancy.parts import ORIGIN, event

MIB = 1024 * 1024
Make = Callable[..., EventRecorder]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """`make(...)` starts a recorder in `tmp_path / "m"`."""
    started: list[EventRecorder] = []

    def run(max_bytes: int = MIB, **options: Any) -> EventRecorder:
        started.append(EventRecorder(Outbox.create(tmp_path / "m", max_bytes), ORIGIN, **options))
        return started[-1]

    yield run
    for recorder in started:
        recorder.close(0.1)


def read(data: Path, after: int = 0) -> list[EventBatch]:
    outboxes = Outboxes(data)
    outboxes.refresh()
    found: list[EventBatch] = []
    for source in outboxes.sources:
        end = after
        while rows := outboxes.read(source, end, 10_000):  # the event of the end of a killed process comes last
            found += rows
            end = rows[-1].last
    outboxes.close()
    return found


def numbers(batches: list[EventBatch]) -> list[int]:
    return [each.id for batch in batches for each in usage_event.read(batch.content)]


def events_file(data: Path) -> Path:
    return next(data.glob("*/events.sqlite"))


def fill(recorder: EventRecorder) -> None:
    def more() -> bool:
        for _ in range(20):
            recorder.record(event())
        return recorder.full

    until(more, 20)


def test_an_event_has_exactly_these_fields(make: Make, tmp_path: Path) -> None:
    make().record(event(cached_tokens=4, output_tokens=3, seconds=0.5))
    until(lambda: bool(read(tmp_path / "m")), 10)
    (batch,) = read(tmp_path / "m")
    (written,) = usage_event.read(batch.content)
    assert abs(1000 * time.time() - written.time_ms) < 60_000
    assert (written.id, written.ended) == (1, None)
    assert written.data == {
        "key_id": "k1",
        "model": "minilm",
        "model_sha256": "ab" * 32,
        "task": "embed",
        "endpoint": "embeddings",
        "inputs": 1,
        "input_tokens": 10,
        "cached_tokens": 4,
        "output_tokens": 3,
        "engine_ms": 2.0,
        "duration_ms": 500.0,
        "status": 200,
        "code": None,
        "hardware": "l4",
        "request_id": "request",
        "requests": 1,
        "team": None,
        "cost": None,
        "currency": None,
        "admitted_ms": None,
    }


def test_what_the_ledger_has_is_freed(make: Make, tmp_path: Path) -> None:
    recorder, data = make(), tmp_path / "m"
    for _ in range(400):
        recorder.record(event())
    until(lambda: len(read(data)) > 1, 10)
    assert recorder.age < 10
    middle = read(data)[0].last
    outbox.write_watermark(events_file(data).parent, middle)
    until(lambda: read(data)[0].first == middle + 1, 10)
    assert read(data)[0].oldest == middle + 1
    outbox.write_watermark(events_file(data).parent, 400)
    until(lambda: not read(data) and recorder.depth == 0, 10)
    until(lambda: recorder.age == 0, 10)


def test_a_reader_may_open_the_file_before_the_table_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = Outbox.create(tmp_path / "m", MIB)
    folder = next((tmp_path / "m").glob("*/"))
    file = sqlite3.connect(folder / "events.sqlite", isolation_level=None)
    file.execute("pragma journal_mode = wal")  # what a server does first
    outboxes = Outboxes(tmp_path / "m")
    outboxes.refresh()
    assert outboxes.read(*outboxes.sources, 0, 10) == []
    written.append(1, 1, 0, usage_event.end(1, 0, clean=True))
    assert [batch.last for batch in outboxes.read(*outboxes.sources, 0, 10)] == [1]
    assert not caplog.records
    outboxes.close()
    file.close()
    written.close()


def test_a_full_outbox_keeps_events_in_memory_then_drops_them_and_recovers(make: Make, tmp_path: Path) -> None:
    recorder, data = make(max_bytes=64 * 1024, max_pending=500), tmp_path / "m"
    fill(recorder)
    time.sleep(0.5)
    assert len(numbers(read(data))) > 10
    for _ in range(300):
        recorder.record(event())
    assert recorder.dropped >= 299
    # The ledger has what is on disk: its place is free again, and the events in memory follow.
    outbox.write_watermark(events_file(data).parent, read(data)[-1].last)
    until(lambda: not recorder.full, 10)
    recorder.record(event())
    issued = recorder.issued
    until(lambda: read(data)[-1].last == issued, 10)
    covered = [number for batch in read(data) for number in range(batch.first, batch.last + 1)]
    lost = set(covered) - set(numbers(read(data)))
    assert covered == list(range(covered[0], issued + 1)), "the numbers of dropped events are covered"
    assert len(lost) == recorder.dropped, "so each of them shows as missing"


def test_a_required_recorder_records_requests_in_flight_also_when_it_is_full(make: Make, tmp_path: Path) -> None:
    recorder = make(max_bytes=8 * 4096, max_pending=50, required=True)
    fill(recorder)
    issued = recorder.issued
    recorder.record(event(status=503, code=UNAVAILABLE, **REJECTED))
    assert recorder.issued == issued, "a rejected request takes no place now"
    recorder.record(event())
    assert (recorder.issued, recorder.dropped) == (issued + 1, 0)


def test_an_outbox_that_another_process_locks_delays_events_and_loses_none(make: Make, tmp_path: Path) -> None:
    recorder, data = make(), tmp_path / "m"
    recorder.record(event())
    until(lambda: bool(read(data)), 10)
    locker = sqlite3.connect(events_file(data), isolation_level=None)
    locker.execute("begin immediate")
    for _ in range(1000):
        recorder.record(event())
    time.sleep(1.5)
    assert (numbers(read(data)), recorder.full) == ([1], False), "a server with `required` rejects nothing"
    locker.execute("rollback")
    locker.close()
    until(lambda: numbers(read(data)) == list(range(1, 1002)), 10)
    assert recorder.dropped == 0


def test_a_batch_that_could_not_be_encoded_again_is_not_lost(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without memory for some time: the batch fails, its events alone do not, and the batch fails again."""
    recorder, data = make(), tmp_path / "m"
    content, failures = recorder._content, list[int]()

    def fails(items: Any) -> bytes:
        if len(items) > 1 and len(failures) < 2:
            failures.append(len(items))
            raise MemoryError
        return content(items)

    monkeypatch.setattr(recorder, "_content", fails)
    for _ in range(5):
        recorder.record(event())
    until(lambda: numbers(read(data)) == [1, 2, 3, 4, 5], 10)
    assert len(failures) == 2
    assert recorder.dropped == 0


@pytest.mark.parametrize("required", [False, True])
def test_an_event_that_cannot_be_encoded_is_the_only_one_lost(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, required: bool
) -> None:
    recorder, data = make(required=required), tmp_path / "m"
    for number in range(20):
        recorder.record(event(key_id="\ud800" if number == 10 else "k1", input_tokens=2**70 if number == 15 else 1))
    until(lambda: len(numbers(read(data))) == 18, 10)
    assert recorder.dropped == 2
    assert "USAGE EVENTS WERE LOST, because they cannot be encoded: 2 (" in caplog.text
    assert recorder.full == required, "if each request must be recorded, no more are accepted"
    recorder.record(event())
    until(lambda: numbers(read(data)) == [n for n in range(1, 22) if n not in (11, 16)], 10)
    for _ in range(300):  # a batch of its own
        recorder.record(event(key_id="\ud800"))
    recorder.record(event())
    issued = recorder.issued
    until(lambda: numbers(read(data))[-1] == issued, 10)
    assert recorder.dropped == 302
    assert recorder.close(5)
    covered = [number for batch in read(data) for number in range(batch.first, batch.last + 1)]
    assert covered == list(range(1, issued + 2)), "lost ones show as missing, and the end is clean"


def test_no_error_ends_the_thread(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, data = make(), tmp_path / "m"
    failures = iter([RuntimeError("injected"), MemoryError()])
    append = Outbox.append

    def fail(self: Outbox, *batch: Any) -> None:
        for error in failures:
            raise error
        append(self, *batch)

    monkeypatch.setattr(Outbox, "append", fail)
    for _ in range(10):
        recorder.record(event())
    until(lambda: numbers(read(data)) == list(range(1, 11)), 10)


REJECTED = {"tokens": 0, "engine_seconds": 0.0}


def data(folder: Path) -> list[dict[str, Any]]:
    return [each.data for batch in read(folder) for each in usage_event.read(batch.content)]


def total(events: list[dict[str, Any]], **where: object) -> int:
    return sum(each["requests"] for each in events if where.items() <= each.items())


@pytest.mark.parametrize(
    ("fields", "events"),
    [
        *(({"status": status, **REJECTED}, 1) for status in (400, 404, 413, 429, 499, 500, 503)),
        ({"status": 503, "code": UNAVAILABLE, **REJECTED}, 1),
        ({"key_id": None, "status": 404, "endpoint": "other", **REJECTED}, 1),
        ({"status": 200, "inputs": 0, **REJECTED}, 1),  # such as GET /v1/models
        *(({"status": status}, 50) for status in (200, 499, 500)),
        ({"status": 499, "tokens": 0}, 50),  # engine seconds
        ({"status": 200, "tokens": 0, "output_tokens": 1, "engine_seconds": 0.0}, 50),
        ({"status": 200, "cached_tokens": 10, "engine_seconds": 0.0}, 50),
    ],
)
def test_requests_that_used_nothing_are_summed(make: Make, tmp_path: Path, fields: dict[str, Any], events: int) -> None:
    recorder = make()
    for _ in range(50):
        recorder.record(event(**fields))
    assert recorder.close(10)
    found = data(tmp_path / "m")[:-1]
    assert (len(found), total(found)) == (events, 50)
    assert {each["inputs"] for each in found} == {0 if events == 1 else 1}


def test_sums_differ_by_key_endpoint_status_code_and_day(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, midnight = make(), 1_790_035_200.0
    variants = [{}, {"key_id": "k2"}, {"key_id": None}, {"endpoint": "rerank"}, {"status": 400}, {"code": "other"}]
    for second in (-0.5, 0.5):
        monkeypatch.setattr(recorders.time, "time", lambda second=second: midnight + second)
        for variant in variants:
            for _ in range(3):
                recorder.record(event(status=429, **REJECTED)._replace(**variant))
    assert recorder.close(10)
    *found, _ = [each for batch in read(tmp_path / "m") for each in usage_event.read(batch.content)]
    assert [each.data["requests"] for each in found] == [3] * 12
    assert [each.time_ms for each in found] == [1000 * int(midnight) - 500] * 6 + [1000 * int(midnight) + 500] * 6


def test_any_number_of_callers_makes_a_bounded_number_of_events(make: Make, tmp_path: Path) -> None:
    recorder = make(max_bytes=16 * MIB)
    for number in range(9000):
        recorder.record(event(f"caller {number % 3000}", status=429 if number % 2 else 404, **REJECTED))
    assert recorder.close(10)
    found = data(tmp_path / "m")[:-1]
    assert len(found) <= 2 * (1000 + 2), "in up to two seconds"
    assert (total(found, status=429), total(found, status=404)) == (4500, 4500)
    assert total(found, key_id="caller 0", status=404) == 3
    assert total(found, key_id="(others)") >= 4000


@pytest.mark.parametrize("required", [False, True])
def test_rejections_do_not_fill_the_outbox(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, required: bool
) -> None:
    monkeypatch.setattr(recorders, "_SUM_S", 0.0)
    recorder, folder = make(max_bytes=128 * 1024, max_pending=100, required=required), tmp_path / "m"
    sent = 0

    def flood() -> None:
        nonlocal sent
        for number in range(500):
            recorder.record(event(f"caller {number}", status=429, **REJECTED))
        sent += 500
        time.sleep(0.03)

    for _ in range(40):
        flood()
    until(lambda: len(recorder._sums) == 500, 20)
    assert not recorder.full
    before = recorder.issued
    for _ in range(100):
        flood()
    assert recorder.issued == before, "the sums wait"
    for _ in range(10):
        recorder.record(event())
    until(lambda: total(data(folder), status=200) == 10, 10)
    stored = total(data(folder))
    # The ledger comes back.
    outbox.write_watermark(events_file(folder).parent, read(folder)[-1].last)
    until(lambda: not recorder._sums, 10)
    assert recorder.close(10)
    assert stored + total(data(folder)[:-1]) == sent + 10
    assert (recorder.dropped, recorder.full) == (0, False)


def test_a_row_of_an_older_version_is_one_request() -> None:
    row = [7, 1000, "k1", "embeddings", 1, 10, 0, 0, 2.0, 500.0, 200, None, "request"]
    assert len(usage_event.requests(ORIGIN, [usage_event.Item(1, 0, event(team="t"))])["requests"][0]) == len(row), (
        "it reads ours"
    )
    common = {"model": "m", "model_sha256": None, "task": "embed", "hardware": None}
    (found,) = usage_event.read(json.dumps({"common": common, "requests": [row]}).encode())
    assert (found.data["requests"], found.data["team"]) == (1, None)


def test_events_have_the_team_of_their_key_and_no_sum_that_of_another(make: Make, tmp_path: Path) -> None:
    recorder = make(max_bytes=16 * MIB)
    for number in range(1500):
        recorder.record(event(f"k{number}", status=429, team=f"t{number}", **REJECTED))
    recorder.record(event("k1", team="t1"))
    recorder.record(event("k2"))
    assert recorder.close(10)
    found = data(tmp_path / "m")[:-1]
    assert (total(found, team="t1", key_id="k1"), total(found, key_id="k2", team=None)) == (2, 1)
    assert total(found, key_id="(others)", team=None) == total(found, key_id="(others)") > 0
    assert all(each["team"] in (None, each["key_id"].replace("k", "t")) for each in found)


KILLED = """
import os, signal, sys, time
from pathlib import Path
from inferctl.tenancy.metering.outbox import Outbox
from inferctl.tenancy.metering.recorder import EventRecorder
from tests.tenancy.parts import ORIGIN, event
recorder = EventRecorder(Outbox.create(Path(sys.argv[1]), 1 << 20), ORIGIN)
for number in range(2000):
    recorder.record(event())
    if number % 10 == 0:
        time.sleep(0.001)
for number in range(300):
    recorder.record(event(f"k{number % 3}", 0, 429, engine_seconds=0.0))
while sys.argv[2] == "written" and recorder._summed:
    time.sleep(0.01)
print(recorder.issued, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("sums", "lost"), [("in memory", 300), ("written", 0)])
def test_after_a_sigkill_the_end_event_tells_exactly_how_many_requests_were_lost(
    tmp_path: Path, sums: str, lost: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "m"), sums],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    batches = read(tmp_path / "m")
    outboxes = Outboxes(tmp_path / "m")
    outboxes.refresh()
    # In one reading: a relay that ends with its server may have no time for another one.
    assert outboxes.read(*outboxes.sources, 0, 10_000)[-1].last == batches[-1].last
    outboxes.close()
    (last,) = usage_event.read(batches[-1].content)
    assert (last.ended, last.data) == ("unclean", {})
    assert last.id == int(done.stdout) + lost + 1, "with the requests in sums"
    assert numbers(batches)[:-1] == list(range(1, batches[-1].first)), "nothing is missing in the middle"
    assert batches[-1].first > 2000 - 1000 and (lost or batches[-1].first == last.id)
    assert numbers(read(tmp_path / "m")) == numbers(batches)
