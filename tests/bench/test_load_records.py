"""Tests of the records file: readable at any time, complete when closed."""

from __future__ import annotations

from pathlib import Path

from inferctl.bench.load import records
from inferctl.bench.loadgen import recorder


def test_records_are_in_the_file_as_soon_as_they_are_added(tmp_path: Path) -> None:
    file = tmp_path / "requests-3.bin"
    writing, tail = recorder.Recorder(file, {"worker": 3}), records.Tail(file)
    assert len(records.read(file)) == len(tail.read_new()) == 0
    # More than one chunk of the file, which grows by 4 MiB. A record has 62 bytes.
    count = recorder.CHUNK // 62 + 10
    for number in range(count):
        writing.add(1, 2, 3, number + 1, number, 0, 0, 0.5, 0.5, 0.5, 200, 1, 0, 0)
    # The file is neither closed nor flushed, as after a kill of its writer.
    assert records.read(file)["index"].tolist() == list(range(count))
    assert len(tail.read_new()) == count
    before = records.read(file)
    writing.close()
    assert records.read(file).tobytes() == before.tobytes()
