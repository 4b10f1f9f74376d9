"""`users: auto`: find the number of users that saturates the servers, before the runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import bench_samples
import numpy as np
import pytest

from inferctl.bench.judge import summary
from inferctl.bench.load.target import ServerConnection
from inferctl.bench.measure import auto_users, closed_loop, concurrency
from inferctl.bench.measure.bench import Bench, started_server
from inferctl.bench.measure.concurrency import Concurrency, Step
from inferctl.bench.measure.measured_server import MeasuredServer
from inferctl.bench.measure.outcome import BenchTarget
from inferctl.bench.plan import plan, shape
from inferctl.bench.report import findings
from inferctl.bench.report.rows import MeasuredRow
from inferctl.config import settings
from inferctl.core.errors import InferctlError, UsageError

AUTO = {"mode": "closed", "users": "auto", "duration_s": 1, "warmup_s": 0.5, "window_s": 0.2, "timeout_s": 5}


@pytest.mark.parametrize("capacity", [5, 8, 40, 200, 500])
def test_a_server_is_saturated_by_the_users_that_are_found(capacity: int) -> None:
    draw = random.Random(capacity)
    for _ in range(200):
        noise = {users: draw.uniform(0.985, 1.015) for users in (8, 16, 32, 64, 128, 256, 512, 1024)}
        found = concurrency.find(
            lambda users, _, noise=noise: Step(users, 100 * min(users, capacity) * noise[users], 20.0)
        )
        assert found.users >= capacity * 0.9
        assert found.users <= max(8, 4 * capacity)
        # Saturation takes two doublings without growth. At a capacity of 500, the limit of 1024 users comes first.
        assert found.saturated == (capacity < 500)


def test_a_noisy_server_is_rarely_called_saturated() -> None:
    """Each step has noise of 10%; four times as many users always gain 11% or more.

    With one measurement per step, 33% of such servers were called saturated, and 10% got under 85% of the highest rate.
    """
    draw, saturated, short = random.Random(2), 0, 0
    for _ in range(500):
        found = concurrency.find(lambda users, _: Step(users, 1000 * users / (users + 40) * draw.gauss(1, 0.1), 10.0))
        saturated += found.saturated
        short += found.saturated and found.users / (found.users + 40) < 0.85
    assert saturated <= 0.18 * 500
    assert short <= 0.05 * 500


def test_one_unlucky_step_does_not_end_the_steps() -> None:
    rates = {8: 100.0, 16: 101.0, 32: 300.0, 64: 303.0, 128: 299.0}
    found = concurrency.find(lambda users, _: Step(users, rates[users], None))
    assert (found.users, found.limited_by, len(found.steps)) == (32, "server", 8)


def test_a_step_lasts_until_each_user_has_sent_ten_requests() -> None:
    lasted: list[tuple[int, float]] = []

    def slow(users: int, seconds: float) -> Step:
        lasted.append((users, seconds))
        return Step(users, 40.0, None)

    assert concurrency.find(slow).users == 8
    assert lasted == [(8, 2.0), (16, 4.0), (32, 8.0), (8, 8.0), (16, 8.0), (32, 8.0)]
    assert concurrency.step_seconds(1024, [Step(512, 20.0, None)]) == 8.0


def test_requests_at_the_ends_of_a_window_count_by_their_share() -> None:
    # Two users, batches of 0.8 s: 2.5 requests/s in any window, though 2 to 6 whole requests end within 2 s.
    for start in (1.0, 1.1, 1.5, 1.75):
        rows = np.zeros(2 * 10, [("intended_ns", "<u8"), ("end_ns", "<u8"), ("error", "u1")])
        rows["intended_ns"] = np.repeat(np.arange(10) * 0.8e9, 2).astype(np.uint64)
        rows["end_ns"] = rows["intended_ns"] + np.uint64(800_000_000)
        part = summary.RunRecords(rows, int(start * 1e9), int((start + 2) * 1e9), 1, None)
        assert closed_loop.weighted_rate(part) == pytest.approx(2.5)


def test_a_busy_load_generator_is_no_saturated_server() -> None:
    found = concurrency.find(lambda users, _: Step(users, 10.0 * users, 2.0 * users))
    assert (found.users, found.limited_by, found.steps[-1].users) == (32, "load generator", 64)
    said = " ".join(findings.saturation([MeasuredRow("a", "measured", concurrency=found.as_dict())]))
    assert "a may not be saturated" in said and "--workers" in said and "can show no difference" in said


def test_a_server_that_rejects_requests_ends_the_steps() -> None:
    """With its SLO, fp16 once rejected 97% of the requests of 1,024 users, and set this number for all."""
    found = concurrency.find(lambda users, _: Step(users, 10.0 * users, None, 0.4 if users < 64 else 30.0))
    assert (found.users, found.limited_by, found.steps[-1].users) == (32, "rejections", 64)
    assert not found.saturated
    said = " ".join(findings.saturation([MeasuredRow("a", "measured", concurrency=found.as_dict())]))
    assert "it rejected 30% of the requests of 64 users" in said
    assert concurrency.find(lambda users, _: Step(users, 5.0, None, 2.0)).users == concurrency.FIRST_USERS


@pytest.mark.parametrize(("rate", "most"), [(2, 32), (25, 32), (100, 128), (400, 1024)])
def test_a_slow_server_does_not_get_1024_users_on_a_busy_machine(rate: float, most: int) -> None:
    """With noise of 40% per step, int8 at 25 requests/s once grew up to 1,024 users, which wait for 40 s."""
    for seed in range(100):
        draw = random.Random(seed)
        found = concurrency.find(lambda users, _, draw=draw: Step(users, rate * max(0.1, draw.gauss(1, 0.4)), None))
        assert max(step.users for step in found.steps) <= 2 * most
        assert found.limited_by in ("server", "latency", "users")


@pytest.mark.parametrize(
    ("found", "users"),
    [
        ([(32, "server", 100), (64, "server", 90)], 64),
        ([(32, "server", 100), (1024, "server", 16)], 32),  # emulated
        ([(32, "server", 100), (1024, "users", 49)], 32),
        ([(32, "server", 100), (1024, "users", 51)], 1024),
        ([(8, "server", 16), (1024, "users", 100)], 1024),
        ([(32, "server", 100), (512, "rejections", 900)], 32),
        ([(64, "rejections", 100), (16, "rejections", 100)], 16),
        ([(64, "load generator", 100)], 64),
        ([(128, "server", 3)], 128),
    ],
)
def test_the_users_of_all_are_those_of_a_fast_server_that_accepts_them(
    found: list[tuple[int, str, float]], users: int
) -> None:
    each = [Concurrency(needed, needed, limit, (Step(needed, rate, 95.0),)) for needed, limit, rate in found]
    shared = concurrency.shared(each)
    assert {one.users for one in shared} == {users}
    assert [one.needed_users for one in shared] == [needed for needed, _, _ in found]
    for one in shared:
        assert one.saturated == (one.limited_by == "server" and one.needed_users <= users)
        said = " ".join(findings.saturation([MeasuredRow("a", "measured", concurrency=one.as_dict())]))
        assert ("a may not be saturated" in said) is not one.saturated


@pytest.mark.parametrize(
    ("levels", "searched"),
    [
        ({"fp32": "native", "fp16": "emulated", "bf16": "native"}, ["fp32", "bf16"]),
        ({"fp16": "emulated", "bf16": "emulated"}, ["fp16", "bf16"]),
    ],
)
def test_an_emulated_precision_does_not_set_the_users_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: dict[str, str], searched: list[str]
) -> None:
    sent: list[str] = []

    @contextlib.contextmanager
    def ready(work: Bench, target: BenchTarget, folder: Path, notify: object) -> Iterator[Any]:
        info = {"precision": {"level": levels[target.name]}}
        server = MeasuredServer(
            ServerConnection("http://127.0.0.1:9", "m", info), None, cast(Any, None), cast(Any, notify)
        )
        yield server

    def find(measure: object) -> Concurrency:
        sent.append("search")
        return Concurrency(64, 64, "server", (Step(64, 100.0, None),))

    monkeypatch.setattr(auto_users, "ready_server", ready)
    monkeypatch.setattr(concurrency, "find", find)
    work = bench(tmp_path, *levels)
    found = auto_users.find(work, {}, lambda _: None)
    assert len(sent) == len(searched)
    assert {name: one.users for name, one in found.items()} == dict.fromkeys(levels, 64)
    assert [name for name, one in found.items() if one.steps] == searched
    rows = [MeasuredRow(name, "measured", concurrency=one.as_dict()) for name, one in found.items()]
    said = " ".join(findings.saturation(rows))
    assert "All were measured with 64 users." in said and "may not be saturated" not in said


@pytest.mark.parametrize(
    ("load", "search", "accepts_all"),
    [
        ({"mode": "closed", "users": 4}, None, True),
        ({"mode": "closed", "users": "auto"}, None, True),
        ({"mode": "closed", "stages": [{"duration_s": 1, "users": 2}]}, None, True),
        ({"mode": "open", "rate": "50%"}, None, True),
        ({"mode": "open", "rate": 20}, None, False),
        ({"mode": "open", "rate": 20, "spike": {"at_s": 1, "duration_s": 1, "times": 5}}, None, False),
        ({"mode": "closed", "users": 4}, {"slo_p99_ms": 50}, False),
    ],
)
def test_a_server_whose_capacity_is_measured_rejects_no_request(
    tmp_path: Path, load: dict[str, Any], search: dict[str, Any] | None, accepts_all: bool
) -> None:
    """The limits of the spec apply to every other load."""
    spec = tmp_path / "inferctl.yaml"
    spec.write_text("name: m\nmodel: {source: org/m}\nslo: {p99_ms: 1}\nserve: {max_wait_seconds: 2}\n")
    show = "import json, os; json.dump(dict(os.environ), open('variables.json', 'w'))"
    made = bench_samples.bench(tmp_path, "fp32", load=load)
    wanted = made.plan.with_overrides(search=search) if search else made.plan
    work = dataclasses.replace(made, plan=wanted, command=lambda *_: [sys.executable, "-c", show])
    with pytest.raises(InferctlError), started_server(work, work.targets[0], tmp_path, lambda *_: None):
        pass
    variables = json.loads((tmp_path / "variables.json").read_text())
    served = settings.resolve(settings.read(spec), variables, {}).spec
    assert (served.slo.p99_ms, served.serve.max_wait_seconds) == ((None, 86_400) if accepts_all else (1, 2))
    assert (served.serve.max_queue_tokens == 262_144) is not accepts_all


def test_a_server_that_answers_nothing_is_an_error() -> None:
    with pytest.raises(InferctlError, match="completed no request of 8 users"):
        concurrency.find(lambda users, _: Step(users, 0.0, 1.0))


def test_auto_is_for_closed_loops_and_the_command_line_wins() -> None:
    made = plan.read_plan("precision")
    assert made.load.auto_users
    assert not made.with_overrides(users=4).load.auto_users
    assert not made.with_overrides(rate=9).load.auto_users
    assert made.with_overrides(search={"slo_p99_ms": 9}).load.auto_users
    assert made.load_with({"users": 3}).users == 3 and not made.load_with({"users": 3}).auto_users
    assert not made.load_with({"rate": 3}).auto_users
    assert plan.Plan.model_validate(made.model_dump(mode="json")) == made
    assert shape.Load.model_validate({"mode": "open", "rate": "50%", "users": "auto"}).auto_users
    for bad in ({"mode": "open", "rate": 9}, {"stages": [{"duration_s": 1, "users": 2}]}):
        with pytest.raises(ValueError, match="users: auto requires a closed loop"):
            shape.Load.model_validate({**bad, "users": "auto"})
    with pytest.raises(UsageError):
        made.with_overrides(load={"users": 0})


def bench(folder: Path, *names: str, slots: int = 12) -> Bench:
    def options(precision: str, _: Path) -> list[str]:
        # bf16 needs twice the users of fp32, so both receive the load of bf16.
        room = slots * (2 if precision == "bf16" else 1)
        return ["--median-ms", "60", "--sigma", "0", "--slots", str(room), "--refuse", "int8"]

    return bench_samples.bench(folder, *names, options=options, load=AUTO)


@pytest.mark.slow
def test_all_configurations_are_measured_with_the_users_that_saturate_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Responses take 60 ms, so ten of each user fit into short steps.
    monkeypatch.setattr(concurrency, "STEP_S", 1.0)
    monkeypatch.setattr(concurrency, "MAX_STEP_S", 2.0)
    work = bench(tmp_path, "fp32", "int8", "bf16", slots=6)
    told: list[str] = []
    outcomes = bench_samples.ran(work, lambda progress: told.append(progress.phase))
    found = bench_samples.collected(work, outcomes).as_dict()
    rows: dict[str, dict[str, Any]] = {row["configuration"]: row for row in found["rows"]}
    assert rows["int8"]["outcome"] == "not run" and rows["int8"]["reason"] == "int8 cannot run on this device"
    needed = {name: rows[name]["concurrency"]["needed_users"] for name in ("fp32", "bf16")}
    # A busy machine can need further steps; fewer users than a server has slots cannot saturate it.
    assert 8 <= needed["fp32"] <= 64 and 16 <= needed["bf16"] <= 128
    users = max(needed.values())
    assert [rows[name]["concurrency"]["users"] for name in needed] == [users, users]
    assert all(rows[name]["concurrency"]["saturated"] for name in needed)
    assert found["load"]["users"] == users
    for outcome in outcomes:
        assert all(run.state["workers"][0]["users"] == users for run in outcome.measurements)
    assert f"All were measured with {users} users." in found["findings"]
    assert "No further gain seen above " in " ".join(found["findings"])
    assert any(phase.startswith("finding users: 16") for phase in told)


def test_a_search_needs_no_users(tmp_path: Path) -> None:
    work = bench(tmp_path, "fp32")
    work = dataclasses.replace(work, plan=work.plan.with_overrides(search={"slo_p99_ms": 50}))
    assert auto_users.find(work, {}, lambda progress: None) == {}
    assert json.loads(work.plan.model_dump_json())["load"]["auto_users"]
