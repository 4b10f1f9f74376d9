"""The fit of the batch latency model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.batching.latency_model import LatencyModel
from tests.latency_models import learned


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


def test_tokens_are_divided_into_batches() -> None:
    model = learned(0.01, 1000)
    assert model.seconds(1000) == pytest.approx(1.01)
    assert model.seconds(1000, batch_tokens=100) == pytest.approx(1.1)
