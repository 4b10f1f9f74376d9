"""A failed or lost request proves nothing by itself: only a share that is shown to be over its limit decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inferctl.bench.judge import probe as probes
from inferctl.bench.judge import slo, summary, validity
from inferctl.bench.load import records
from inferctl.receipts import shares
from tests.bench.bench_samples import FIELDS, SECOND

BUDGET = 0.001


def run_of(latency_ms: np.ndarray[Any, Any], lost: np.ndarray[Any, Any], gap_ms: float = 10.0) -> summary.RunRecords:
    """Return a run of evenly spaced requests with these latencies, of which some are lost (failed with HTTP 500)."""
    rows = np.zeros(len(latency_ms), np.dtype(FIELDS))
    start_ns = np.arange(len(rows)) * int(gap_ms * 1e6)
    rows["intended_ns"] = rows["sent_ns"] = start_ns
    rows["first_ns"] = rows["end_ns"] = start_ns + (latency_ms * 1e6).astype(np.int64)
    rows["status"], rows["phase"] = np.where(lost, 500, 200), records.MEASURED
    rows["error"] = np.where(lost, records.HTTP_ERROR, records.OK)
    return summary.RunRecords(rows, 0, int(len(rows) * gap_ms / 1000 * SECOND), 1, len(rows))


@pytest.mark.parametrize(
    ("count", "total", "limit", "exceeds"),
    [
        (0, 100, 0.0, False),
        (1, 100, 0.0, True),
        (1, 423, BUDGET, False),
        (2, 1962, BUDGET, False),
        # 97.5% lower bounds by Clopper and Pearson: 0.051% and 0.110%.
        (4, 2000, BUDGET, False),
        (6, 2000, BUDGET, True),
        (6119, 6119, BUDGET, True),
        (5, 5, 1.0, False),
    ],
)
def test_a_count_exceeds_a_limit_only_if_its_lower_bound_does(
    count: int, total: int, limit: float, exceeds: bool
) -> None:
    assert shares.exceeds(count, total, limit) is exceeds


@pytest.mark.parametrize("total", [100, 423, 2000, 20_000])
@pytest.mark.parametrize("share", [BUDGET, 0.01])
def test_a_share_at_its_limit_exceeds_it_in_2_5_percent_of_the_samples(total: int, share: float) -> None:
    drawn = np.random.default_rng(total).binomial(total, share, 4000)
    assert np.mean([shares.exceeds(int(count), total, share) for count in drawn]) < 0.025 + 0.007
    more = np.random.default_rng(total).binomial(total, 5 * share, 500)
    assert np.mean([shares.exceeds(int(count), total, share) for count in more]) > (0.9 if total * share >= 10 else 0)


@pytest.mark.parametrize(
    ("count", "total", "text"),
    [(6119, 6119, "100%"), (5, 2100, "0.24%"), (1, 8, "12%"), (1, 3_000_000, "0.000033%"), (0, 0, "0%")],
)
def test_a_share_is_printed_without_an_exponent(count: int, total: int, text: str) -> None:
    assert shares.percent(count, total) == text


@pytest.mark.parametrize("total", [200, 423, 900, 2000])
def test_failures_within_the_error_budget_do_not_make_small_samples_invalid(total: int) -> None:
    """Half of the error budget fails. Before, one failure in 423 requests was enough: 20% of the runs were invalid."""
    drawn = np.random.default_rng(1).binomial(total, BUDGET / 2, 2000)
    judged = [
        validity.judge_requests({"requests": total, "errors": {"timeout": int(count)}, "rejected": 0}, 100 * BUDGET)
        for count in drawn
    ]
    assert np.mean([not found.valid for found in judged]) < 0.01


def test_a_failure_that_does_not_decide_is_a_warning_with_its_share_and_the_budget() -> None:
    found = validity.judge_requests({"requests": 423, "errors": {"timeout": 1}, "rejected": 0}, 0.1)
    assert found == validity.Validity(
        (),
        (
            "1 of 423 requests failed (timeout: 1), 0.24% with an error budget of 0.1%, "
            "in a sample too small to decide: use a longer `--duration`",
        ),
    )
    all_failed = validity.judge_requests({"requests": 6119, "errors": {"timeout": 6119}, "rejected": 0}, 0.1)
    assert all_failed.reasons == (
        "6119 of 6119 requests failed (timeout: 6119), 100% with an error budget of 0.1%: see the log of the server",
    )


@pytest.mark.parametrize("total", [100, 400, 2000])
def test_an_slo_is_not_missed_by_lost_requests_unless_they_are_shown_to_exceed_1_percent(total: int) -> None:
    """The true share of lost requests is 0.9%. Before, 22% to 29% of the results said that the SLO is not met."""
    random, missed = np.random.default_rng(2), 0
    for _ in range(100):
        found = summary.summarize([run_of(random.exponential(5, total), random.random(total) < 0.009)])
        judged = slo.judge(found["latency_ms"], 100, summary.lost_requests(found), BUDGET)
        missed += judged.met is False
    assert missed <= 5


def test_many_lost_requests_miss_the_slo_however_small_the_sample_is() -> None:
    found = summary.summarize([run_of(np.full(50, 5.0), np.arange(50) < 10)])
    judged = slo.judge(found["latency_ms"], 100, 10, BUDGET)
    assert (judged.met, judged.reason) == (False, "10 of 50 requests (20%) got no good response")


def test_lost_requests_and_slow_ones_count_together() -> None:
    """0.9% are lost and 0.8% are slow, so the p99 of all requests is over the SLO. Before, 99% were said to meet it."""
    random, met, total = np.random.default_rng(3), 0, 30_000
    limit_ms = -10 * np.log(0.008)
    for _ in range(10):
        found = summary.summarize([run_of(random.exponential(10, total), random.random(total) < 0.009)])
        met += slo.judge(found["latency_ms"], limit_ms, summary.lost_requests(found), 0.01).met is True
        assert found["latency_ms"]["p99_of_all"]["low"] > found["latency_ms"]["p99"]["high"]
    assert met == 0


def test_the_p99_of_all_requests_is_in_a_summary_only_if_requests_were_lost() -> None:
    latency = np.linspace(1, 100, 1000)
    assert "p99_of_all" not in summary.summarize([run_of(latency, np.zeros(1000, bool))])["latency_ms"]
    found = summary.summarize([run_of(latency, np.arange(1000) % 125 == 60)])["latency_ms"]
    assert found["n"] == 992
    assert found["p99_of_all"]["value"] > found["p99"]["value"]
    # Eight of a thousand: the upper end of the interval of the p99 is a lost request.
    assert found["p99_of_all"]["high"] is None
    judged = slo.judge(found, 200, 8, 0.01)
    assert (judged.met, judged.interval_contains_limit) == (None, True)
    assert "unbounded), because 8 of 1000 requests (0.8%) got no good response" in judged.reason


def test_failed_requests_are_no_sign_that_a_server_fell_behind() -> None:
    """3% fail at once, and the error budget allows 5%: each other request is complete in time."""
    part = run_of(np.full(2000, 5.0), np.arange(2000) % 33 == 0)
    found = summary.summarize([part])
    assert found["answered"] < validity.ACHIEVED_LIMIT * (found["offered"] or 0)
    assert validity.judge(found, {}, {"steady": True}, cores=2).valid
    assert probes.judge(found, 80, 20.0, budget=0.05).limited_by != "fell behind"


@pytest.mark.parametrize(("total", "lost"), [(500, 1), (2000, 3)])
def test_a_probe_with_few_failures_is_undecided(total: int, lost: int) -> None:
    found = summary.summarize([run_of(np.full(total, 5.0), np.arange(total) < lost)])
    judged = probes.judge(found, 80, 20.0, budget=BUDGET)
    probe = probes.make("sweep", 100, 1, found, judged)
    assert not probe.meets_slo and not probe.above_limit
    assert probe.insufficient or probe.interval_contains_slo
    if total == 2000:
        assert judged.reason.endswith(
            "but 3 of 2000 requests (0.15%) got no good response, "
            "which is not shown to be over the error budget of 0.1%"
        )


def test_a_probe_with_many_failures_is_above_the_limit() -> None:
    found = summary.summarize([run_of(np.full(500, 5.0), np.arange(500) < 5)])
    judged = probes.judge(found, 80, 20.0, budget=BUDGET)
    assert (judged.meets_slo, judged.limited_by) == (False, "errors")
    assert probes.make("sweep", 100, 1, found, judged).above_limit
