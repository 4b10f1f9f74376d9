from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_samples import SECOND, records_file, row, steady, table

from inferctl.bench.judge import stages, summary
from inferctl.bench.load import records
from inferctl.bench.load.records import DROPPED, HTTP_ERROR, WARMUP
from inferctl.bench.loadgen import recorder
from inferctl.bench.plan import shape
from inferctl.core.errors import InferctlError


def test_throughput_counts_answers_within_the_window_only() -> None:
    before, across = row(950, 40, phase=WARMUP), row(995, 10, phase=WARMUP)
    within, draining = [row(1010, 20), row(1500, 20)], row(2990, 20)
    part = summary.RunRecords(table(before, across, *within, draining), SECOND, 3 * SECOND, 4)
    found = summary.summarize([part])
    assert (found["requests_per_s"], found["texts_per_s"], found["tokens_per_s"]) == (1.5, 6.0, 15.0)
    assert found["requests"] == found["latency_ms"]["n"] == 3


def test_latency_counts_from_the_intended_send() -> None:
    part = summary.RunRecords(table(*(row(100 * i, 50, late_ms=30) for i in range(10))), 0, SECOND, 1, offered=10)
    found = summary.summarize([part])
    assert found["latency_ms"]["p50"]["value"] == 50.0
    assert found["late"] == 10
    assert found["requested_per_s"] == 10.0


def test_failed_and_dropped_requests_are_counted_and_not_timed() -> None:
    bad = [row(410 + i, 0, error=error) for i, error in enumerate((HTTP_ERROR, DROPPED, DROPPED))]
    rows = [*(row(10 * i, 5) for i in range(40)), *bad]
    found = summary.summarize([summary.RunRecords(table(*rows), 0, SECOND, 1)])
    assert found["errors"] == {"HTTP status": 1, "dropped": 2}
    assert (found["dropped"], found["requests"]) == (2, 43)
    assert (found["latency_ms"]["n"], found["requests_per_s"]) == (40, 40.0)


def test_percentiles_that_the_sample_does_not_support_have_no_value() -> None:
    found = summary.summarize([steady(10, 20)])["latency_ms"]
    assert found["n"] == 100
    assert found["p90"]["value"] is not None
    assert found["p99"] == {"value": None, "low": None, "high": None, "needed": 368, "dependence": None}


def test_answers_that_queue_behind_each_other_have_wider_intervals_in_summary_and_stages() -> None:
    def run(latencies: list[float]) -> summary.RunRecords:
        return summary.RunRecords(table(*(row(10 * i, ms) for i, ms in enumerate(latencies))), 0, 10 * SECOND, 1, 1000)

    random = np.random.default_rng(2)
    drawn = [float(ms) for ms in random.permutation(np.arange(1.0, 1001.0))]
    alike = [ms for start in range(0, 1000, 50) for ms in sorted(drawn)[start : start + 50]]
    load = shape.Load.model_validate({"stages": [{"duration_s": 9, "rate": 100}, {"duration_s": 1, "rate": 100}]})
    for q in ("p50", "p90"):
        mixed, sorted_ = (summary.summarize([run(one)])["latency_ms"][q] for one in (drawn, alike))
        assert mixed["value"] == sorted_["value"]
        assert sorted_["dependence"] > 5 > mixed["dependence"] >= 1
        assert sorted_["high"] - sorted_["low"] > 2 * (mixed["high"] - mixed["low"])
        mixed, sorted_ = (stages.summarize([run(one)], load)[0]["latency_ms"][q] for one in (drawn, alike))
        assert sorted_["dependence"] > 5 > mixed["dependence"] >= 1


def test_runs_are_pooled() -> None:
    found = summary.summarize([steady(100, 10), steady(50, 30)])
    assert found["runs"] == 2
    assert found["seconds"] == 20.0
    assert found["latency_ms"]["n"] == 1500
    assert found["requests_per_s"] == pytest.approx(75, abs=0.3)
    span = found["requests_per_s_interval"]
    assert span["over"] == "windows"
    # Two runs of 50 and 100 requests/s: Student's t with one degree of freedom.
    assert span["high"] - 75 == pytest.approx(12.706 * 25, rel=0.02)
    assert span["low"] == 0


def test_three_runs_give_an_interval_over_runs() -> None:
    found = summary.summarize([steady(rate, 10) for rate in (98, 100, 102)])["requests_per_s_interval"]
    assert found["over"] == "runs"
    assert found["high"] - found["low"] == pytest.approx(2 * 4.303 * (4 / 3) ** 0.5, rel=0.05)


def test_the_servers_own_figures_are_medians_where_it_gives_them() -> None:
    assert summary.summarize([steady(10, 20)])["server_ms"] == {"queue": 1.0, "inference": 2.0}


def test_records_are_read_back_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    rows = table(row(1, 2), row(3, 4))
    file = records_file(tmp_path / "requests-0.bin", rows)
    assert records.read(file).tobytes() == rows.tobytes()
    file.write_bytes(file.read_bytes()[:-1])
    assert len(records.read(file)) == 1


def test_workers_are_merged_in_the_order_of_intended_sends(tmp_path: Path) -> None:
    records_file(tmp_path / "requests-0.bin", table(row(5, 1), row(9, 1)))
    records_file(tmp_path / "requests-1.bin", table(row(1, 1), row(7, 1)))
    assert [int(ns / 1e6) for ns in records.merge(tmp_path)["intended_ns"]] == [1, 5, 7, 9]


def test_files_that_hold_no_records_are_refused(tmp_path: Path) -> None:
    (tmp_path / "requests-0.bin").write_bytes(b"something else\n{}\n")
    with pytest.raises(InferctlError, match="not a records file"):
        records.merge(tmp_path)
    with pytest.raises(InferctlError, match="no records"):
        records.merge(tmp_path / "empty")


def test_a_tail_follows_a_growing_file(tmp_path: Path) -> None:
    file = tmp_path / "requests-0.bin"
    tail = records.Tail(file)
    assert len(tail.read_new()) == 0
    rows = table(row(1, 2), row(3, 4))
    records_file(file, rows[:1])
    assert len(tail.read_new()) == 1
    with file.open("ab") as stream:
        stream.write(rows[1:].tobytes()[:-3])
        stream.flush()
        assert len(tail.read_new()) == 0
        stream.write(rows[1:].tobytes()[-3:])
    assert tail.read_new()["intended_ns"].tolist() == [3_000_000]


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
