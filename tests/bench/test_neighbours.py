"""`--neighbors`: the factor between latencies with idle and with loaded neighbors; pairs of runs on real processes."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import bench_samples
import numpy as np
import pytest
from bench_samples import SECOND, row, table

from inferctl import cli
from inferctl.bench import stats
from inferctl.bench.judge import interference, summary
from inferctl.bench.judge.validity import Validity
from inferctl.bench.load import records
from inferctl.bench.measure import environment, neighbors, resume, runner
from inferctl.bench.measure.bench import Bench
from inferctl.bench.measure.judgment import judge_outcome
from inferctl.bench.measure.outcome import Measurement, NeighborLoad
from inferctl.bench.plan import plan
from inferctl.bench.plan.shape import Load
from inferctl.bench.report import result
from inferctl.bench.report.receipts import write_all
from inferctl.receipts import receipt


def drawn(seed: int, count: int, scale: float) -> summary.RunRecords:
    """Return a run with log-normal latencies around `scale` ms."""
    draw = random.Random(seed)
    rows = [row(10 * i, scale * math.exp(draw.gauss(0, 0.4))) for i in range(count)]
    return summary.RunRecords(table(*rows), 0, 10 * SECOND, 1)


def figures_of(found: interference.Inflation, key: str) -> interference.Figures:
    figures = found.percentiles[key]
    assert isinstance(figures, interference.Figures)
    return figures


@pytest.mark.parametrize("pairs", [1, 4])
def test_less_than_five_pairs_have_a_factor_and_no_interval(pairs: int) -> None:
    found = interference.inflation(
        [drawn(2 * i, 2000, 10) for i in range(pairs)], [drawn(2 * i + 1, 2000, 25) for i in range(pairs)]
    ).as_dict()
    assert found["interval"] == "none: an interval needs 5 pairs of runs"
    for figures in found["percentiles"].values():
        assert (figures["low"], figures["high"]) == (None, None)
        assert figures["factor"] == pytest.approx(2.5, rel=0.2)


def test_with_five_pairs_the_interval_is_over_runs_and_knows_how_they_differ() -> None:
    # Pairs differ by up to 30%. The factor within a pair is 2, give or take a tenth.
    scales = [(8.0, 16.2), (13.0, 25.5), (10.0, 20.9), (9.0, 17.5), (12.0, 24.0)]
    without = [drawn(2 * i, 800, a) for i, (a, _) in enumerate(scales)]
    loaded = [drawn(2 * i + 1, 800, b) for i, (_, b) in enumerate(scales)]
    found = interference.inflation(without, loaded)
    assert found.pairs == 5
    assert "5 pairs of runs" in found.interval
    figures = figures_of(found, "p50")
    assert figures.high is not None
    logs = [
        math.log(np.quantile(records.latency_ms(b.measured), 0.5) / np.quantile(records.latency_ms(a.measured), 0.5))
        for a, b in zip(without, loaded, strict=True)
    ]
    expected = stats.mean_interval(logs)
    assert expected
    assert figures.factor == pytest.approx(math.exp(expected[0]), rel=0.01)
    assert figures.high / figures.factor == pytest.approx(math.exp(expected[1]), rel=0.01)


def test_a_percentile_that_n_does_not_support_has_no_factor() -> None:
    found = interference.inflation([drawn(1, 300, 10)], [drawn(2, 4000, 25)]).as_dict()["percentiles"]
    assert found["p99"]["factor"] is None
    assert (found["p99"]["n"], found["p99"]["needed"]) == (300, 368)
    assert found["p50"]["factor"] is not None


@pytest.mark.parametrize("side", ["without", "loaded"])
def test_a_run_that_answered_nothing_good_leaves_no_factor(side: str) -> None:
    broken = summary.RunRecords(
        table(*(row(10 * i, 5, error=records.HTTP_ERROR) for i in range(500))), 0, 10 * SECOND, 1
    )
    runs = {"without": [drawn(1, 4000, 10), drawn(3, 4000, 10)], "loaded": [drawn(2, 4000, 25), drawn(4, 4000, 25)]}
    assert figures_of(interference.inflation(**runs), "p50").factor > 0
    runs[side][1] = broken
    found = interference.inflation(**runs).as_dict()
    assert receipt.canonical(found)
    for figures in found["percentiles"].values():
        assert (figures["factor"], figures["low"], figures["high"], figures["n"]) == (None, None, None, 0)


def test_what_a_neighbour_achieved_counts_within_the_window_only() -> None:
    rows = table(row(0, 500), row(900, 200), row(1500, 100), row(1600, 100, error=records.TIMEOUT), row(1900, 300))
    assert interference.achieved(rows, 1 * SECOND, 2 * SECOND) == (2.0, 1, 0)


def test_a_neighbour_that_rejects_requests_is_under_load_unless_it_rejects_all() -> None:
    """Before, a rejected request counted as failed, and a neighbor with admission control made the run invalid."""
    rows = table(*(row(10 * i, 5, error=records.HTTP_ERROR) for i in range(50)), *(row(10 * i, 5) for i in range(50)))
    rows["status"][:50] = records.REJECTED
    some = NeighborLoad(1, True, None, *interference.achieved(rows, 0, SECOND))
    assert (some.requests_per_s, some.failed, some.rejected) == (50.0, 0, 50)
    assert some.problem(1) is None
    every = NeighborLoad(1, True, None, *interference.achieved(rows[:50], 0, SECOND))
    assert "rejected all 50 requests (429)" in (every.problem(1) or "")


@pytest.mark.parametrize(("repeat", "busy"), [(0, (False, True)), (1, (True, False)), (2, (False, True))])
def test_pairs_alternate(repeat: int, busy: tuple[bool, bool]) -> None:
    assert neighbors.load_order(repeat) == busy


def test_servers_are_spread_over_the_slices_that_there_are() -> None:
    three = neighbors.mig_devices({"CUDA_VISIBLE_DEVICES": "MIG-a, MIG-b,MIG-c"})
    assert [neighbors.command_on_device(["serve"], three, number)[1] for number in range(4)] == [
        "CUDA_VISIBLE_DEVICES=MIG-a",
        "CUDA_VISIBLE_DEVICES=MIG-b",
        "CUDA_VISIBLE_DEVICES=MIG-c",
        "CUDA_VISIBLE_DEVICES=MIG-b",
    ]
    assert neighbors.command_on_device(["serve"], ["MIG-a"], 1) == ["env", "CUDA_VISIBLE_DEVICES=MIG-a", "serve"]
    # With several whole GPUs, the neighbors run on the GPU of the measured server.
    assert neighbors.mig_devices({"CUDA_VISIBLE_DEVICES": "0,1"}) == []
    assert neighbors.command_on_device(["serve"], [], 1) == ["serve"]


def test_the_neighbors_send_the_inputs_of_the_plan() -> None:
    busy = neighbors.background(Load(mode="open", rate=50, inputs="zipf", zipf_s=1.2, zipf_share=0.5))
    assert (busy.inputs, busy.zipf_s, busy.zipf_share) == ("zipf", 1.2, 0.5)
    assert neighbors.background(Load(inputs="as-is")).inputs == "as-is"


def test_the_background_outlasts_the_run_and_is_a_closed_loop() -> None:
    load = Load(mode="open", rate=50, users=3, duration_s=20, warmup_s=10, timeout_s=5)
    busy = neighbors.background(load)
    assert (busy.mode, busy.users) == ("closed", 3)
    assert busy.duration_s > load.duration_s + load.warmup_s + load.timeout_s


def bench(folder: Path, count: int, repeats: int, *options: str, only: str = "") -> Bench:
    """Return a benchmark of pairs on the answering server; `options` are for the server in the folder `only`."""

    def given(_: str, announce: Path) -> list[str]:
        return ["--median-ms", "4", *(options if only in announce.parts else ())]

    return bench_samples.bench(folder, "fp32", options=given, repeats=repeats, neighbours=count)


def receipt_of(work: Bench) -> dict[str, Any]:
    outcomes = runner.outcomes(work)
    runner.run(work, outcomes, lambda progress: None, lambda outcome: None)
    assert outcomes[0].failure is None
    context = result.ReceiptContext(work.plan, environment.detect(), "test", [], None, work.output)
    write_all(context, outcomes)
    return receipt.load(work.output / "receipts" / "fp32.json").data


@pytest.mark.slow
def test_a_pair_measures_both_ways_and_records_what_the_neighbours_did(tmp_path: Path) -> None:
    found = receipt_of(bench(tmp_path, 2, 2))
    section = found["neighbours"]
    assert (section["count"], section["pairs"], section["valid"]) == (2, 2, True)
    assert [one["first"] for one in section["runs"]] == ["without", "with"]
    assert section["percentiles"]["p50"]["factor"] > 0
    for one in section["runs"]:
        assert [other["outlived"] for other in one["others"]] == [True, True]
        assert all(other["requests_per_s"] > 20 for other in one["others"])
    # The receipt describes the runs with idle neighbors.
    assert found["summary"]["latency_ms"]["n"] == sum(run["summary"]["latency_ms"]["n"] for run in found["runs"])
    assert found["summary"]["requests_per_s"] == section["requests_per_s"]["without"]
    assert len(list(tmp_path.glob("runs/fp32-*/with-neighbours/requests-*.bin"))) == 2


def test_a_neighbour_that_did_not_outlive_the_run_makes_it_invalid(tmp_path: Path) -> None:
    made = runner.outcomes(bench(tmp_path, 1, 1))[0]

    part, folder = drawn(1, 1000, 5), tmp_path / "runs" / "fp32-1"
    measured = Measurement(plan.Run("fp32", 0), 0.0, part, {"steady": True}, {}, folder, {"name": "x"}, 1)

    def loaded(outlived: bool, failure: str | None = None, failed: int = 0) -> Measurement:
        return dataclasses.replace(measured, neighbors=[NeighborLoad(1, outlived, failure, 9.0, failed)])

    def judged(run: Measurement) -> Validity:
        made.measurements[:] = [dataclasses.replace(measured, with_neighbors=run)]
        return judge_outcome(made, 2, 0.1).validity

    assert judged(loaded(False)).reasons == (
        "with loaded neighbors: run 1: neighbor 1 did not stay under load (no response came after the end of the run): "
        "see its logs in neighbour-1",
    )
    assert "did not stay under load (it crashed)" in judged(loaded(True, "it crashed")).reasons[0]
    assert "failed 50 requests" in judged(loaded(True, failed=50)).reasons[0]
    assert judged(loaded(True, failed=1)).valid


def test_a_neighbour_that_dies_meanwhile_makes_the_run_invalid_with_its_reason(tmp_path: Path) -> None:
    found = receipt_of(bench(tmp_path, 1, 1, "--die-after", "60", only="neighbour-1"))
    assert found["validity"]["valid"] is False
    assert any(
        "neighbor 1 did not stay under load" in one and "out of memory" in one for one in found["validity"]["reasons"]
    )
    left = [
        entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and str(tmp_path).encode() in _command(entry)
    ]
    assert left == []


def _command(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def test_pairs_outlast_a_bench_that_was_killed(tmp_path: Path) -> None:
    work = bench(tmp_path, 1, 1)
    outcomes = runner.outcomes(work)
    runner.run(work, outcomes, lambda progress: None, lambda outcome: None)
    again = runner.outcomes(work)
    assert resume.restore(tmp_path, work.order, again) == 1
    then, now = (neighbors.document(one[0].measurements, 2, 0.1) for one in (outcomes, again))
    assert json.dumps(then) == json.dumps(now)
    assert dataclasses.asdict(again[0].measurements[0].run) == {"configuration": "fp32", "repeat": 0}


def test_the_command_refuses_neighbours_of_a_running_server(
    tmp_path: Path, answering: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["bench", "--url", f"mine={answering()}", "--plan", "quick", "--neighbours", "1"]) == 2
    assert "mine is already running" in capsys.readouterr().err
    assert not (tmp_path / "bench-results").exists()
