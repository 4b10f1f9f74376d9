"""The plan of a merge gate: throughput in a closed loop, latency in an open one at a share of the capacity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inferctl.bench.judge import comparable, compare
from inferctl.bench.plan import plan
from inferctl.receipts import receipt
from tests.processes import inferctl

# The plan `gate`, with short runs.
SHORT = """name: short
configurations: [{name: a, precision: fp32}]
corpus: short
quality: null
repeats: 2
load: {mode: open, rate: 50%, users: 4, capacity_s: 1, duration_s: 3, warmup_s: 0}
"""


def bench(folder: Path, *options: str) -> dict[str, Any]:
    (folder / "short.yaml").write_text(SHORT)
    done = inferctl("bench", "--plan", "short.yaml", "--json", *options, cwd=folder, timeout=None)
    assert done.returncode in (0, 5), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_rate_in_percent_is_a_share_of_a_capacity_that_is_measured_first() -> None:
    gate = plan.read_plan("gate")
    assert (gate.load.mode, gate.load.capacity_percent, gate.load.rate) == ("open", 50, None)
    assert plan.Plan.model_validate(gate.model_dump(mode="json", exclude_unset=True)) == gate
    at = gate.load.at(333.33)
    assert (at.rate, at.duration_s) == (167, 10)
    assert gate.load.at(20).duration_s == 43  # as long as a p99 needs at 10 requests/s
    assert gate.load.at(2).duration_s == 60
    assert gate.with_overrides(rate=40).load.capacity_percent is None
    assert gate.load_with({"rate": 30}).capacity_percent is None
    assert gate.load_with({"rate": "30%"}).capacity_percent == 30


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [2, pytest.param(5, marks=pytest.mark.slow_measurement)])
def test_a_stall_that_a_closed_loop_hides_is_found(answering: Callable[..., str], tmp_path: Path, repeats: int) -> None:
    """300 ms of every 3 s: one slow response per client of the closed loop, one in ten of the open loop."""
    server = ("--median-ms", "20", "--sigma", "0.1")
    old, new = answering(*server), answering(*server, "--stall-every", "3", "--stall-for", "0.3")
    found = bench(tmp_path, "--url", f"old={old}", "--url", f"new={new}", "--repeats", str(repeats))
    receipts = [receipt.load(Path(row["receipt"])) for row in found["rows"]]
    capacity = receipts[0].data["closed_loop"]["reference_rps"]
    first = next(run for run in receipts[0].data["runs"] if run["repeat"] == 0)
    assert capacity == first["closed_loop"]["summary"]["requests_per_s"]
    for one in receipts:
        load = one.data["plan"]["load"]
        assert load["rate"] == pytest.approx(0.5 * capacity, rel=0.01)
        assert one.data["summary"]["requested_per_s"] == pytest.approx(load["rate"], rel=0.2)
        assert one.data["closed_loop"]["summary"]["runs"] == repeats
    pair = comparable.ReceiptPair(*receipts)
    assert [reason for reason in comparable.invalid_because(pair, []) if "differ" in reason] == []
    judged = {
        metric.name: compare.judge(pair, metric, compare.CompareOptions(), 5)
        for metric in compare.CompareOptions().selected(pair)
    }
    # Few repeats on a busy machine can leave it open. They never let it pass.
    assert judged["p99"].outcome in ("regression", "not enough evidence")
    if not any(row["noise"] for row in found["rows"]):
        assert (judged["p99"].new or 0) > 2 * (judged["p99"].old or 0) > 0
    # Both receive the same offered rate, so the closed loops show the throughput.
    assert (sample := judged["requests_per_s"].sample)
    assert sample.old_runs == [
        round(run["closed_loop"]["summary"]["requests_per_s"], 4)
        for run in sorted(receipts[0].data["runs"], key=lambda run: run["repeat"])
    ]
    assert any(said.startswith("Requests/s in a closed loop of 4 users: ") for said in found["findings"])
