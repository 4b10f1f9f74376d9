"""Tests of the records file: readable at any time, complete when closed, comparable between clocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_samples import records_file, row, table

from inferctl.bench.load import records


@pytest.fixture
def loadgen() -> Any:
    from inferctl.bench.loadgen import clock, recorder

    return clock, recorder


def test_records_are_in_the_file_as_soon_as_they_are_added(loadgen: Any, tmp_path: Path) -> None:
    _, recorder = loadgen
    file = tmp_path / "requests-3.bin"
    writing, tail = recorder.Recorder(file, {"worker": 3}), records.Tail(file)
    assert len(records.read(file)) == len(tail.read_new()) == 0
    # More than one chunk of the file, which grows by 4 MiB. A record has 60 bytes.
    count = recorder.CHUNK // 60 + 10
    for number in range(count):
        writing.add(1, 2, 3, number + 1, number, 0, 0, 0.5, 0.5, 0.5, 200, 1, 0)
    # The file is neither closed nor flushed, as after a kill of its writer.
    assert records.read(file)["index"].tolist() == list(range(count))
    assert len(tail.read_new()) == count
    copy = tmp_path / "requests-4.bin"
    copy.write_bytes(writing.since(0))
    writing.close()
    assert records.read(copy).tobytes() == records.read(file).tobytes()
    assert file.read_bytes() == copy.read_bytes()


def test_records_of_another_clock_are_shifted_to_the_local_one(tmp_path: Path) -> None:
    records_file(tmp_path / "requests-0.bin", table(row(1, 5), row(3, 5)))
    remote = table(row(2, 5))
    remote["first_ns"] = 0
    for name in ("intended_ns", "sent_ns", "end_ns"):
        remote[name] += np.uint64(10**12)
    records_file(tmp_path / "requests-10.bin", remote)
    merged = records.merge(tmp_path, {10: 10**12})
    assert merged["intended_ns"].tolist() == [1_000_000, 2_000_000, 3_000_000]
    assert records.latency_ms(merged).tolist() == [5, 5, 5]
    # A missing time stays 0.
    assert merged["first_ns"].tolist()[1] == 0


def test_the_shortest_round_trip_gives_the_offset_and_its_uncertainty(loadgen: Any) -> None:
    clock, _ = loadgen
    offset = 5_000_000
    # 100 ns to the remote machine and 300 ns back. The longer trips have the opposite asymmetry.
    trips = [(0, 900 + offset, 1000), (2000, 2100 + offset, 2400), (5000, 7000 + offset, 7100)]
    found = clock.offset(trips)
    assert found.uncertainty_ns == 200
    assert abs(found.ns - offset) <= found.uncertainty_ns
    assert clock.machine() == clock.machine()
