"""Quantiles of Student's t, against tables and against its distribution function."""

from __future__ import annotations

import pytest

from inferctl.bench import student_t

# Abramowitz and Stegun, table 26.10.
TABLE = {
    (0.95, 30): 1.697,
    (0.975, 1): 12.706,
    (0.975, 4): 2.776,
    (0.975, 120): 1.980,
    (0.995, 5): 4.032,
}


@pytest.mark.parametrize(("p", "degrees"), TABLE)
def test_quantiles_are_those_of_the_tables(p: float, degrees: int) -> None:
    assert student_t.quantile(p, degrees) == pytest.approx(TABLE[p, degrees], abs=6e-4)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.975, 0.9995, 1 - 0.05 / 200])
@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 199, 200, 201, 202, 1000, 10_001])
def test_quantiles_invert_the_distribution(p: float, degrees: int) -> None:
    assert student_t.distribution(student_t.quantile(p, degrees), degrees) == pytest.approx(p, abs=1e-10)
