from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.bench import stats


def below(k: int, n: int, q: float) -> float:
    """P(B <= k) for a binomial B, by the definition."""
    return math.fsum(math.comb(n, i) * q**i * (1 - q) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize(("q", "n"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368), (0.999, 3688)])
def test_samples_needed_for_a_finite_interval(q: float, n: int) -> None:
    assert stats.needed(q) == n
    assert stats.interval_ranks(n, q) is not None
    assert stats.interval_ranks(n - 1, q) is None


@pytest.mark.parametrize(
    ("n", "q", "expected"),
    [(100, 0.99, 99), (100, 0.5, 50), (101, 0.5, 51), (10, 0.9, 9), (1, 0.99, 1), (1000, 0.999, 999)],
)
def test_rank_is_the_smallest_with_enough_at_or_below_it(n: int, q: float, expected: int) -> None:
    assert stats.rank(n, q) == expected


@pytest.mark.parametrize(
    ("n", "q", "expected"), [(10, 0.5, (2, 9)), (6, 0.5, (1, 6)), (100, 0.5, (40, 61)), (368, 0.99, (360, 368))]
)
def test_known_interval_ranks(n: int, q: float, expected: tuple[int, int]) -> None:
    assert stats.interval_ranks(n, q) == expected


@given(st.integers(6, 400), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_intervals_cover_and_no_narrower_one_does(n: int, q: float) -> None:
    found = stats.interval_ranks(n, q)
    if found is None:
        assert n < stats.needed(q)
        return
    low, high = found
    assert below(low - 1, n, q) <= 0.025 + 1e-9 < below(low, n, q) + 1e-9
    assert 1 - below(high - 1, n, q) <= 0.025 + 1e-9 < 1 - below(high - 2, n, q) + 1e-9


@given(st.lists(st.floats(0, 1e6), min_size=6, max_size=300), st.sampled_from([0.5, 0.9]))
def test_a_quantile_is_a_measured_value_within_its_interval(values: list[float], q: float) -> None:
    found = stats.quantile(sorted(values), q)
    if found.value is None:
        assert found.text == f"n too small: {len(values)} of {stats.needed(q)}"
        return
    assert found.value in values
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    assert sum(v <= found.value for v in values) >= q * len(values) - 1e-9
    assert sum(v < found.value for v in values) < q * len(values) + 1e-9


def test_exact_percentiles_of_one_to_a_thousand() -> None:
    ascending = np.arange(1.0, 1001.0)
    p50, p99 = stats.quantile(ascending, 0.5), stats.quantile(ascending, 0.99)
    assert (p50.value, p50.low, p50.high) == (500.0, 469.0, 532.0)
    assert (p99.value, p99.low, p99.high) == (990.0, 983.0, 997.0)


def test_intervals_hold_the_truth_in_about_95_of_100_samples() -> None:
    random = np.random.default_rng(5)
    truth = 3.0 * math.log(10)  # p90 of an exponential distribution with mean 3
    hits = 0
    for _ in range(400):
        found = stats.quantile(np.sort(random.exponential(3.0, 200)), 0.9)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    assert 0.92 < hits / 400 <= 1


def test_mean_interval_of_known_values() -> None:
    assert stats.mean_interval([1.0, 2.0]) is None
    found = stats.mean_interval([10.0, 12.0, 11.0, 9.0, 13.0])
    assert found is not None
    mean, half = found
    assert mean == 11.0
    assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5))


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.706), (10, 2.228), (20, 2.086), (30, 2.042), (120, 1.980)])
def test_student_t_agrees_with_the_tables(degrees: int, expected: float) -> None:
    assert stats.student_t(degrees) == pytest.approx(expected, abs=0.001)


def test_the_curve_reaches_as_far_as_the_sample_does() -> None:
    shares = [share for share, _ in stats.curve(np.arange(1.0, 101.0))]
    assert shares[0] == 0
    assert shares[-2] == 0.99
    assert shares[-1] == 1
    assert stats.curve(np.zeros(0)) == []
