"""The fit of the batch latency model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.batching.latency_model import Capacity, LatencyModel
from inferctl.core.errors import UsageError
from inferctl.serve.observe import describe

REJECTS = "admission  rejects requests (429) whose predicted latency exceeds"


@given(st.floats(0.001, 0.1), st.floats(1e3, 1e6), st.integers(0, 1000))
def test_the_fit_recovers_fixed_time_and_rate(fixed: float, rate: float, seed: int) -> None:
    model, chance = LatencyModel(), random.Random(seed)
    for _ in range(300):
        tokens = chance.randint(1, 4096)
        model.observe(tokens, fixed + tokens / rate)
    for tokens in (64, 2048):
        assert model.seconds(tokens) == pytest.approx(fixed + tokens / rate, rel=0.02)


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-5, 100)), min_size=1, max_size=60))
def test_the_fit_is_never_negative_or_falling(seen: list[tuple[int, float]]) -> None:
    model = LatencyModel()
    for tokens, seconds in seen:
        model.observe(tokens, seconds)
        assert model.fixed >= 0
        assert model.per_token > 0
        assert model.seconds(100) <= model.seconds(200)


def test_one_stall_changes_little_and_a_lasting_change_is_followed() -> None:
    model = LatencyModel()
    for tokens in [100, 1000, 2000] * 20:
        model.observe(tokens, 0.01 + tokens / 10_000)
    before = model.seconds(1000)
    model.observe(1000, 60.0)
    assert model.seconds(1000) < 1.3 * before
    for tokens in [100, 1000, 2000] * 40:
        model.observe(tokens, 0.01 + tokens / 2_000)
    assert model.seconds(1000) == pytest.approx(0.51, rel=0.1)


def test_batches_of_one_size_are_enough_to_predict_that_size() -> None:
    model = LatencyModel()
    for _ in range(10):
        model.observe(500, 0.25)
    assert model.seconds(500) == pytest.approx(0.25)
    assert not LatencyModel().known
    assert LatencyModel().seconds(500) == 0


def test_a_measured_capacity_is_the_start_value(tmp_path: Path) -> None:
    file = tmp_path / "capacity.json"
    file.write_text('{"fixed_s": 0.01, "tokens_per_s": 1000, "slo_p99_ms": 250, "note": "ignored"}')
    capacity = Capacity.read(file)
    assert capacity.slo_p99_ms == 250
    model = LatencyModel(capacity)
    assert model.seconds(1000) == pytest.approx(1.01)
    assert model.seconds(1000, batch_tokens=100) == pytest.approx(1.1)
    for tokens in [100, 1000] * 200:
        model.observe(tokens, tokens / 2000)
    assert model.seconds(1000) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fixed_s", -0.001),
        ("fixed_s", True),
        ("fixed_s", None),
        ("tokens_per_s", 0),
        ("tokens_per_s", -5.0),
        ("tokens_per_s", True),
        ("tokens_per_s", math.nan),
        ("tokens_per_s", "fast"),
        ("slo_p99_ms", 0),
        ("slo_p99_ms", False),
        ("parallel_batches", 0),
        ("max_batch_tokens", 2048.5),
        ("max_batch_tokens", True),
    ],
)
def test_an_invalid_value_is_named(key: str, value: object, tmp_path: Path) -> None:
    file = tmp_path / "capacity.json"
    file.write_text(json.dumps({"fixed_s": 0, "tokens_per_s": 15_000, "slo_p99_ms": None}))
    assert Capacity.read(file) == Capacity(0, 15_000)
    file.write_text(json.dumps({"fixed_s": 0.004, "tokens_per_s": 15_000, key: value}))
    with pytest.raises(UsageError, match=f"`{key}` must be a"):
        Capacity.read(file)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"fixed_s": 0.1, "tokens_per_s": 0}', '{"fixed_s": "a", "tokens_per_s": 9}']
)
def test_a_file_without_a_capacity_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "capacity.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"capacity\.json") as raised:
        Capacity.read(file)
    assert "tokens_per_s" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("spec_ms", "capacity_ms", "line"),
    [
        (70, 200, f"{REJECTS} 70 ms (slo.p99_ms)"),
        (None, 200, f"{REJECTS} 200 ms (slo_p99_ms of the capacity file)"),
        (None, None, None),
    ],
)
def test_the_server_prints_the_slo_that_it_enforces(
    spec_ms: float | None, capacity_ms: float | None, line: str | None
) -> None:
    assert describe.admission_line(spec_ms, capacity_ms) == line
