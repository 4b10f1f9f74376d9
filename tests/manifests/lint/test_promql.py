"""Expressions of PromQL: what is wrong with them, and which metrics they read."""

from __future__ import annotations

import pytest

from inferctl.manifests.lint import promql

GOOD = [
    "up",
    'sum by (pod) (rate(inferctl_tokens_total{service="a"}[5m])) / (0.7 * 90000)',
    "histogram_quantile(0.99, sum by (le) (rate(inferctl_request_duration_seconds_bucket[5m])))",
    "max_over_time((count(inferctl_engine_up) or vector(0))[10m:1m])",
    'label_replace(up{job=~"a|b}"}, "x", "$1", "pod", "(.*)")',
]
BAD = [
    "sum(rate(a[5m])",
    "a{b='c'",
    "sum(a))",
    "(a]",
    'a{b="c}',
    "",
    "rate(a)",
    "sum(",
    "a b",
    "a + ",
    "rate(a[5 minutes])",
]


@pytest.mark.parametrize("expression", GOOD)
def test_good_expressions_have_no_problem(expression: str) -> None:
    assert promql.problem(expression) is None


@pytest.mark.parametrize("expression", BAD)
def test_bad_expressions_have_a_problem(expression: str) -> None:
    problem = promql.problem(expression)
    assert problem and "\n" not in problem


def test_metrics_that_no_server_has_are_named() -> None:
    expression = 'sum(inferctl_b{job="inferctl_x"}) / on (inferctl_y) inferctl_a + other + inferctl_tokens_total'
    assert promql.unknown_metrics(expression) == ["inferctl_a", "inferctl_b"]
