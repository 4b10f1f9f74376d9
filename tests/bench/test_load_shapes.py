"""Tests of stages, spikes and repeated inputs: drawn before the run, sent as drawn, summarized by stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from test_load import measure

from inferctl.bench.judge import stages
from inferctl.bench.load import target
from inferctl.bench.plan import shape, workload


def make_load(**keys: Any) -> shape.Load:
    return shape.Load.model_validate(keys)


def test_stages_set_the_duration_and_the_loop() -> None:
    opened = make_load(stages=[{"duration_s": 2, "rate": 10}, {"duration_s": 3, "rate": 40, "name": "busy"}])
    assert (opened.mode, opened.duration_s) == ("open", 5)
    assert [stage.name for stage in opened.timeline] == ["stage-1", "busy"]
    closed = make_load(stages=[{"duration_s": 2, "users": 1}, {"duration_s": 2, "users": 7}])
    assert (closed.mode, closed.peak_users) == ("closed", 7)


@pytest.mark.parametrize(
    "keys",
    [
        {"stages": [{"duration_s": 2, "rate": 1}, {"duration_s": 2, "users": 1}]},
        {"stages": [{"duration_s": 2, "rate": 1}], "duration_s": 9},
        {"stages": [{"duration_s": 2, "rate": 1}], "rate": 5},
        {"stages": [{"duration_s": 2, "rate": 0}]},
        {"mode": "open", "rate": 5, "spike": {"at_s": 10, "duration_s": 10, "times": 2}},
        # A share of the capacity that means nothing.
        {"mode": "closed", "rate": "50%"},
        *({"rate": rate} for rate in ("0%", "150%", "half")),
        {"rate": "50%", "stages": [{"duration_s": 1, "rate": 5}]},
    ],
)
def test_contradictory_loads_are_rejected(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make_load(**keys)


@pytest.mark.parametrize(
    "shape",
    [
        {"mode": "open", "rate": 5},
        {"rate": "60%", "users": "auto"},
        {"mode": "open", "rate": 5, "spike": {"at_s": 1, "duration_s": 1, "times": 2}},
        {"stages": [{"duration_s": 2, "rate": 1}]},
    ],
)
def test_a_single_stage_sends_the_same_requests_without_the_shape(shape: dict[str, Any]) -> None:
    requests = {"inputs": "zipf", "zipf_share": 0.5, "inputs_per_request": 2, "timeout_s": 9, "workers": 2}
    load = make_load(**shape, **requests)
    for stage in ({"duration_s": 3}, {"mode": "open", "rate": 7, "duration_s": 3}):
        assert load.as_single_stage(**stage) == make_load(**stage, **requests)


def test_each_stage_has_its_own_rate() -> None:
    load = make_load(mode="open", rate=50, duration_s=60, spike={"at_s": 20, "duration_s": 10, "times": 6})
    times = workload.draw(load, "short", 1).schedule_ns / 1e9
    assert (np.diff(times) >= 0).all()
    counts = [int(np.sum((times >= low) & (times < high))) for low, high in ((0, 20), (20, 30), (30, 60))]
    for count, expected in zip(counts, (1000, 3000, 1500), strict=True):
        assert abs(count - expected) < 5 * expected**0.5
    assert [stage.name for stage in load.timeline] == ["before", "spike", "after"]


def test_zipf_inputs_repeat_by_rank_and_the_rest_is_unique() -> None:
    load = make_load(inputs="zipf", zipf_s=1, zipf_share=0.75)
    work = workload.draw(load, "short", 1)
    half = work.unique_from
    assert len(work.groups) == 2 * half
    repeated = work.order[work.order < half]
    assert len(repeated) / len(work.order) == pytest.approx(0.75, abs=0.01)
    share = np.bincount(repeated, minlength=half) / len(repeated)
    harmonic = np.sum(1 / np.arange(1, half + 1))
    assert share[0] == pytest.approx(1 / harmonic, rel=0.1)
    assert share[0] / share[9] == pytest.approx(10, rel=0.3)
    bodies = work.bodies(target.ServerConnection("http://test", "m").body)
    assert not any(b"@SERIAL@" in body for body in bodies[:half])
    assert all(b"@SERIAL@" in body for body in bodies[half:])
    assert workload.draw(make_load(), "short", 1).unique_from == 0


def test_a_spike_is_sent_as_drawn_and_shows_in_its_stage(answering: Callable[..., str], tmp_path: Path) -> None:
    keys = {"mode": "open", "rate": 40, "arrivals": "constant", "duration_s": 3}
    shape = {**keys, "spike": {"at_s": 1, "duration_s": 1, "times": 5}}
    _, part, work = measure(answering("--median-ms", "2"), tmp_path / "run", **shape)
    offsets = part.measured["intended_ns"].astype(np.int64) - part.start_ns
    assert offsets.tolist() == work.schedule_ns.astype(np.int64).tolist()
    assert (part.measured["sent_ns"] >= part.measured["intended_ns"]).all()
    rows = stages.summarize([part], make_load(**shape))
    assert [(one["name"], one["requests"]) for one in rows] == [("before", 40), ("spike", 200), ("after", 40)]
    assert sum(one["latency_ms"]["n"] for one in rows) == 280


def test_the_users_of_a_closed_loop_follow_its_stages(answering: Callable[..., str], tmp_path: Path) -> None:
    shape = [{"duration_s": 1, "users": users} for users in (2, 6, 1)]
    _, part, _ = measure(answering("--median-ms", "20", "--sigma", "0"), tmp_path / "run", stages=shape)
    rows = part.measured
    sent = stages.offsets_s(part, rows["sent_ns"])
    end = stages.offsets_s(part, rows["end_ns"])
    at_once = {at: int(np.sum((sent <= at) & (end > at))) for at in np.arange(0.05, 3, 0.01)}
    most = [max(count for at, count in at_once.items() if low < at % 3 < low + 1) for low in (0, 1, 2)]
    assert most[0] == 2
    assert most[1] == 6
    # Users with a request in flight at the change still receive its response, but send no further request.
    assert max(count for at, count in at_once.items() if at > 2.5) == 1
