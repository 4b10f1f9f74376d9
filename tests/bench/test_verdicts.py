"""Validity, quality, findings and receipts."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import winners
from bench_samples import FIELDS, MACHINE, SECOND, document, row, sealed, steady, table

from inferctl.bench import privacy
from inferctl.bench.judge import neighbors, slo, summary, validity
from inferctl.bench.load.records import TIMEOUT, WARMUP
from inferctl.bench.measure import closed_loop, environment, quality
from inferctl.bench.measure.bench import Bench
from inferctl.bench.measure.outcome import BenchTarget, Measurement, Outcome, WorkloadRecord
from inferctl.bench.plan import plan, sections, shape
from inferctl.bench.report import caveats, findings, receipts, result, rows
from inferctl.bench.report.caveats import Caveat
from inferctl.bench.report.receipts import write_all
from inferctl.bench.report.rows import MeasuredRow, Row, RunFigures
from inferctl.core.errors import InferctlError, InvalidRunError
from inferctl.receipts import receipt

LIMITS = sections.Quality.model_validate({})


def judged(part: summary.RunRecords, **resources: float) -> validity.Validity:
    return validity.combine([alone(part, **resources)], summary.summarize([part]), 0.1)


def offered(part: summary.RunRecords, count: int) -> summary.RunRecords:
    return dataclasses.replace(part, offered=count)


def late(every: int) -> summary.RunRecords:
    """Return an open loop in which each n-th request is sent 2 ms late."""
    rows = [row(10 * i, 5, late_ms=2 if i % every == 0 else 0) for i in range(1000)]
    return summary.RunRecords(table(*rows), 0, 10 * SECOND, 1, offered=1000)


def slow(indices: Sequence[int]) -> summary.RunRecords:
    """Return an open loop in which the responses of these indices are slow."""
    rows = [row(10 * i, 50 if i in indices else 5) for i in range(1000)]
    return summary.RunRecords(table(*rows), 0, 11 * SECOND, 1, 1000)


@pytest.mark.parametrize(
    ("part", "resources", "reason", "caution"),
    [
        (steady(100, 10), {"client_cpu_percent": 89.9}, "", ""),
        (steady(100, 10), {"client_cpu_percent": 90.1}, "used 90% of its core (limit 90%) and was the bottleneck", ""),
        (offered(steady(97, 1), 1000), {}, "970 of 1000 offered requests were completed in time (97%, limit 98%)", ""),
        (offered(steady(97, 1), 985), {}, "", ""),
        (late(50), {}, "", "sent 20 of 1000 requests over 1 ms late (2.0%)"),
        (late(100), {}, "", ""),
        (steady(3, 10), {}, "30 of the 36 responses that a p90 needs", ""),
        (offered(steady(30, 10), 300), {}, "", "300 of the 368 responses that a p99 needs"),
        (steady(30, 10), {}, "", ""),
        # Responses that depend on each other say too little for a p99.
        (slow(range(400, 440)), {}, "", "(1000 responses, autocorrelated), and the p99 needs 368"),
        (slow(range(0, 1000, 25)), {}, "", ""),
    ],
)
def test_a_run_is_judged_by_its_figures(
    part: summary.RunRecords, resources: dict[str, float], reason: str, caution: str
) -> None:
    found = judged(part, **resources)
    assert [bool(found.reasons), bool(found.cautions)] == [bool(reason), bool(caution)]
    assert reason in "".join(found.reasons) and caution in "".join(found.cautions)


@pytest.mark.parametrize(("failed", "valid"), [(1, True), (2, True), (6, False), (20, False)])
def test_more_failed_requests_than_the_error_budget_make_a_configuration_invalid(failed: int, valid: bool) -> None:
    rows = [row(2 * i, 1) for i in range(2000 - failed)] + [row(4100, 5, error=TIMEOUT) for _ in range(failed)]
    found = judged(summary.RunRecords(table(*rows), 0, 5 * SECOND, 1))
    (said,) = found.cautions if valid else found.reasons
    assert found.valid is valid and f"{failed} of 2000 requests failed (timeout: {failed})" in said
    assert (f"{failed / 20:g}% with an error budget of 0.1%" in said) is not valid


def test_the_error_budget_is_of_all_runs_together() -> None:
    """One failure is 0.25% of its run and 0.05% of all five runs."""
    rows = [row(10 * i, 5) for i in range(400)]
    runs = [summary.RunRecords(table(*rows, row(4100, 5, error=TIMEOUT)), 0, 5 * SECOND, 1)]
    runs += [summary.RunRecords(table(*rows), 0, 5 * SECOND, 1)] * 4
    each = [alone(part) for part in runs]
    assert validity.combine(each, summary.summarize(runs), 0.1).valid
    assert not validity.combine(each, summary.summarize(runs), 0).valid


def rejecting(every: int, count: int = 1000, offered: int | None = None) -> summary.RunRecords:
    """Return a run in which each n-th request is rejected at once with 429."""
    rows = [list(row(10 * i, 1 if i % every == 0 else 5, error=int(i % every == 0))) for i in range(count)]
    for number in range(0, count, every):
        rows[number][FIELDS.index(("status", "<u2"))] = 429
    return summary.RunRecords(table(*map(tuple, rows)), 0, count * SECOND // 100, 1, offered)


def test_rejected_requests_are_an_outcome_of_their_own() -> None:
    part = rejecting(20, offered=1000)
    found = summary.summarize([part])
    assert (found["rejected"], found["rejected_percent"]) == (50, 5.0)
    assert (summary.failures(found), summary.lost_requests(found)) == ({}, 50)
    assert found["latency_ms"]["min"] == 5  # not the latency of a rejected request
    (caution,) = judged(part).cautions
    assert "rejected 50 of 1000 requests (429, 5%)" in caution and judged(part).valid


@pytest.mark.parametrize(
    ("every", "count", "offered", "valid"),
    [
        (4, 1000, None, False),  # 25%, as fp16 once had with the SLO that `init` wrote
        (50, 1000, None, False),  # 2%
        (90, 1000, None, True),  # 1.2%, which does not show that the true share is over 1%
        (90, 100_000, None, False),  # 1.1%, which does
        (200, 1000, None, True),  # 0.5%
        (50, 100, None, True),  # 2 of 100
        (1, 40, None, False),
        (4, 1000, 1000, True),  # an open loop sends its schedule: the share of rejected requests is the result
    ],
)
def test_a_closed_loop_with_many_rejections_is_invalid(every: int, count: int, offered: int, valid: bool) -> None:
    part = rejecting(every, count, offered)
    found = validity.judge_requests(summary.summarize([part]), 0.1)
    assert found.valid is valid
    (said,) = found.cautions if valid else found.reasons
    assert f"rejected {-(-count // every)} of {count} requests" in said
    assert ("users" in said) is not valid


def test_configurations_that_all_reject_many_requests_are_not_ranked(tmp_path: Path) -> None:
    """Their latencies are those of the requests that each server selected. The p99 of all has no upper bound."""
    parts = {"a": rejecting(20, offered=1000), "b": rejecting(50, offered=1000)}
    made = [document(name, 100, 10) | {"summary": summary.summarize([part])} for name, part in parts.items()]
    found = findings.describe(rows_of(tmp_path, *made, mode="open"), 0.1)
    assert found[0].endswith("rejects over 1% of the requests: none is recommended.")


def test_a_closed_loop_that_rejects_most_requests_shows_no_capacity(tmp_path: Path) -> None:
    measured = Measurement(plan.Run("a", 0), 0.0, rejecting(1), {}, {}, tmp_path, {}, 1)
    server = SimpleNamespace(measure=lambda *_: measured)
    server.labeled = lambda _: server
    load = shape.Load.model_validate({"mode": "open", "rate": "50%", "users": 4})
    with pytest.raises(InferctlError, match=r"closed loop with 4 users: .*429, 100%, .*raise `slo\.p99_ms`"):
        closed_loop.measure(cast(Any, server), load, "short", 1, plan.Run("a", 0), tmp_path)


def test_the_share_of_other_processes_is_that_of_the_busiest_run() -> None:
    part = steady(100, 10)
    each = [alone(part, other_cores=cores) for cores in (0.19, 0.5, 1.72, 1.0)]
    (caution,) = validity.combine(each, summary.summarize([part] * 4), 0.1).cautions
    assert caution.startswith("other processes used up to 86% of the cores (limit 10%)")


def test_a_warning_that_differs_in_a_share_only_is_given_once_for_all_configurations() -> None:
    busy = [judged(steady(100, 10), other_cores=cores).cautions for cores in (1.6, 1.2, 0.0)]
    rows = [MeasuredRow(name, "measured", cautions=found) for name, found in zip("abc", busy, strict=True)]
    rows = [dataclasses.replace(row, quality={"checked": True}) for row in rows]
    (warning,) = caveats.caveats(rows)
    assert warning.text.startswith("a, b: other processes used up to 80% of the cores")


def busy(api: float = 50, engine: float | None = 20, waiting: float = 2, **more: float) -> dict[str, float]:
    own = {} if engine is None else {"engine_busy_percent": engine}
    return {"api_busy_percent": api, "api_waiting_percent": waiting, "client_cpu_percent": 20} | own | more


BACKEND = {"backend_busy_percent": 96.0, "backend_waiting_percent": 1.0}
TOKENIZER = {"tokenizer_busy_percent": 95.0, "tokenizer_waiting_percent": 1.0}


@pytest.mark.parametrize(
    ("resources", "processes", "words"),
    [
        (busy(97), 1, ("loop of the API process", "work 97%", "engines 20%", "serve.api_processes: 2", "replica")),
        (busy(97), 4, ("loop of 4 API processes", "serve.api_processes: 8")),
        (busy(60, **TOKENIZER), 1, ("tokenizer threads of the API process", "work 95%", "serve.api_processes: 2")),
        (busy(97, **BACKEND), 4, ("loop of the backend", "work 96%", "faster CPU")),
        (busy(70, **BACKEND), 4, ("loop of the backend", "work 96%", "faster CPU")),
        (busy(97, waiting=40), 1, ("work 97%", "40% waiting for a core", "more CPU cores")),
        (busy(97, engine=None), None, ("loop of the API process", "work 97%", "faster CPU")),
        (busy(97), 64, ("64 API processes", "faster CPU")),
        (busy(97, engine=95), 1, ()),
        (busy(70, engine=95, **BACKEND), 4, ()),
        (busy(60, engine=95, **TOKENIZER), 1, ()),
        (busy(89), 1, ()),
        (busy(60, engine=60), 1, ()),
        ({"client_cpu_percent": 20.0}, 1, ()),
    ],
)
def test_a_front_end_without_time_left_is_named_if_engines_had_some(
    resources: dict[str, float], processes: int | None, words: Sequence[str], tmp_path: Path
) -> None:
    info = {"api_processes": {"count": processes}} if processes else {}
    part = steady(100, 10)
    run = Measurement(plan.Run("a", 0), 0.0, part, {"steady": True}, resources, tmp_path, info, 1)
    found = run.validity_on(cores=2)
    assert found.valid
    assert len(found.cautions) == bool(words)
    for text in found.cautions:
        assert all(each in text for each in words)
        assert ("serve.api_processes" in text) == any("serve.api_processes" in each for each in words)


def alone(part: summary.RunRecords, **resources: float) -> validity.Validity:
    return validity.judge(summary.summarize([part]), resources, {"steady": True}, cores=2)


def test_a_run_in_which_an_engine_crashed_is_invalid() -> None:
    assert "engines crashed and restarted" in judged(steady(100, 10), engine_restarts=1.0).reasons[0]


# 30 answers are too few for a p90, 300 for a p99.
@pytest.mark.parametrize(("rate", "runs", "reasons"), [(3, 15, 0), (30, 15, 0), (1, 2, 1)])
def test_pooling_runs_can_make_n_large_enough(rate: float, runs: int, reasons: int) -> None:
    parts = [steady(rate, 10)] * runs
    whole = validity.combine([alone(part) for part in parts], summary.summarize(parts), 0.1)
    assert (len(whole.reasons), whole.cautions) == (reasons, ())
    assert all("20 of the 36 responses that a p90 needs" in reason for reason in whole.reasons)


@pytest.mark.parametrize(
    ("key", "first", "second", "what"),
    [
        ("model", {"sha256": "a"}, {"sha256": "b"}, "the model's sha256 (a, b)"),
        ("precision", {"effective": "fp32"}, {"effective": "bf16"}, "effective precision (fp32, bf16)"),
        ("attention", "packed", "padded", "attention (packed, padded)"),
        ("image", {"digest": "sha256:1"}, None, "image (sha256:1, None)"),
        ("device", {"name": "CPU"}, {"name": "T4"}, "device (CPU, T4)"),
        ("ready_seconds", 1.0, 2.0, None),
    ],
)
def test_runs_of_different_servers_are_not_one_configuration(key: str, first: Any, second: Any, what: str) -> None:
    reasons = validity.judge_identity([{key: first}, {key: second}]).reasons
    said = f"the runs differ in {what}: do not change the server during a benchmark"
    assert reasons == ((said,) if what else ())


def offering(rate: float, latency_ms: float, *, slower_by: float = 0.0, warm: bool = True) -> summary.RunRecords:
    """An open loop of 10 s whose latency grows by `slower_by` of the time; `warm`: after the same load."""
    gap = 1000 / rate
    start = 10_000
    before = [row(start - gap * i, latency_ms, phase=WARMUP) for i in range(1, 50)] if warm else []
    rows = [row(start + gap * i, latency_ms + slower_by * gap * i) for i in range(int(rate * 10))]
    return summary.RunRecords(table(*before, *rows), start * 10**6, (start + 10_000) * 10**6, 1, offered=len(rows))


@pytest.mark.parametrize("warm", [True, False])
def test_requests_in_flight_at_the_end_are_not_held_against_a_server_that_keeps_up(warm: bool) -> None:
    # Two seconds each at 40 requests/s: 80 of 400 requests are always in flight.
    assert judged(offering(40, 2000, warm=warm)).reasons == ()


@pytest.mark.parametrize(("slower_by", "valid"), [(0.0, True), (0.005, True), (0.1, False), (1.0, False)])
def test_a_server_that_falls_behind_is_found_by_its_growing_delay(slower_by: float, valid: bool) -> None:
    found = judged(offering(100, 20, slower_by=slower_by))
    assert found.valid is valid
    assert all("the server fell behind" in reason for reason in found.reasons)


def test_one_invalid_run_makes_the_configuration_invalid() -> None:
    parts = [steady(100, 10), steady(100, 10)]
    each = [alone(parts[0]), alone(parts[1], client_cpu_percent=99)]
    (reason,) = validity.combine(each, summary.summarize(parts), 0.1).reasons
    assert reason.startswith("run 2: the load generator used 99% of its core")


def test_equal_vectors_are_perfect_whatever_their_length() -> None:
    vectors = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    found = quality.compare(vectors, 3 * vectors, LIMITS)
    assert found.cosine == {"mean": 1.0, "p1": 1.0, "min": 1.0}
    assert found.recall_at_10 == 1.0
    assert found.passes


def test_cosine_and_recall_of_known_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "NEIGHBORS", 2)
    angles = np.radians([0, 10, 20, 100, 110, 120])
    expected = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    moved = np.radians([0, 10, 105, 100, 110, 120])  # the third moves to the other group
    found = np.stack([np.cos(moved), np.sin(moved)], 1).astype(np.float32)
    # Nearest two, before: 0:{1,2} 1:{0,2} 2:{1,0} 3:{4,5} 4:{3,5} 5:{4,3};
    # after: 0:{1,3} 1:{0,3} 2:{3,4} 3:{2,4} 4:{2,3 or 5} 5:{4,2}.
    result = quality.compare(expected, found, LIMITS)
    assert result.recall_at_10 == pytest.approx((1 / 2 + 1 / 2 + 0 + 1 / 2 + 1 / 2 + 1 / 2) / 6, abs=1e-4)
    cosine = result.cosine
    assert cosine and cosine["min"] == pytest.approx(np.cos(np.radians(85)), abs=1e-5)


def test_a_configuration_under_the_limits_fails() -> None:
    vectors = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    noisy = vectors + np.random.default_rng(2).normal(size=vectors.shape).astype(np.float32)
    assert quality.compare(vectors, noisy, LIMITS).passes is False


def rows_of(folder: Path, *documents: dict[str, Any], mode: str = "closed") -> list[MeasuredRow]:
    """Return the measured rows of receipts."""
    found = [rows.of_outcome(Outcome(BenchTarget(one.name, one.name)), one) for one in sealed(folder, *documents)]
    return [dataclasses.replace(row, mode=mode) for row in found if isinstance(row, MeasuredRow)]


def repeated(name: str, rate: float, factors: Sequence[float], latency_ms: float = 10) -> dict[str, Any]:
    """Return a receipt with a run per factor: its rate is multiplied by the factor, its latency divided."""
    found = summary.summarize([steady(rate, latency_ms)])["latency_ms"]

    def run(repeat: int, factor: float) -> dict[str, Any]:
        latencies = {key: {**found[key], "value": found[key]["value"] / factor} for key in ("p50", "p90", "p99")}
        figures = {"requests_per_s": rate * factor, "latency_ms": latencies}
        return {"repeat": repeat, "records": [], "timeline": [], "summary": figures}

    runs = [run(repeat, factor) for repeat, factor in enumerate(factors)]
    return document(name, rate, latency_ms) | {"runs": runs}


CALM = [1.0, 1.01, 0.99, 1.005, 0.995]
NOISY = [1.0, 1.08, 0.92, 1.05, 0.95]


def one_run(folder: Path, figures: dict[str, tuple[float, ...]], **level: str) -> list[MeasuredRow]:
    """Return the rows of a closed loop: by name, requests/s and the ends of their interval, if there is one."""
    rows = rows_of(folder, *(document(name, 50, 10, level.get(name, "native")) for name in figures))
    return [
        dataclasses.replace(
            row,
            requests_per_s=rate,
            requests_per_s_interval={"low": ends[0], "high": ends[1], "over": "windows"} if ends else None,
        )
        for row in rows
        for rate, *ends in [figures[row.configuration]]
    ]


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (
            {"fp32": (50, 48, 52), "bf16": (100, 96, 104), "int8": (80, 78, 82)},
            ("bf16 is fastest in this run: 1.25x", "of int8 (1.17x to 1.33x), 2.00x", "(1.85x to 2.17x), at cosine"),
        ),
        # A difference under 5% is not clear, whatever its interval.
        ({"fp32": (100, 99.9, 100.1), "bf16": (104, 103.9, 104.1)}, ("No clear difference between bf16 and fp32",)),
        ({"fp32": (100, 90, 160), "bf16": (150, 90, 160)}, ("No clear difference", "1.50x", "(0.56x to 1.78x).")),
        (
            {"fp32": (100, 90, 110), "bf16": (110, 100, 120), "int8": (100, 80, 120)},
            ("No clear difference between bf16, fp32 and int8", "(0.91x to 1.33x) and", "of int8 (0.83x to 1.50x)."),
        ),
        (
            {"fp16": (16.0, 15.0, 17.0), "bf16": (86.9, 70.0, 104.0), "int8": (73.2, 60.0, 86.0)},
            ("bf16 is faster in this run: 5.43x", "emulated fp16", "no clear difference between bf16 and int8"),
        ),
        # Without an interval, the figures are still a finding: it was a bare `inconclusive`, also at 10x.
        (
            {"fp16": (10,), "bf16": (100, 96, 104), "int8": (80, 78, 82)},
            ("bf16 is faster in this run: 1.25x", "10.0x", "which has too few samples for an interval."),
        ),
        ({"fp16": (10, 0, 20), "bf16": (100, 96, 104)}, ("bf16 is fastest in this run: 10.0x", "(4.80x or more)")),
    ],
)
def test_one_run_has_a_finding_with_its_interval_and_no_winner(
    tmp_path: Path, figures: dict[str, tuple[float, ...]], words: tuple[str, ...]
) -> None:
    found = findings.describe(one_run(tmp_path, figures, fp16="emulated"), 0.1)
    assert found[0].startswith(words[0]) and all(each in found[0] for each in words), found[0]
    assert "For a winner, run again with `--repeats 5`." in found


def test_a_winner_has_an_interval_over_five_repeats(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, repeated("fp32", 50, CALM), repeated("bf16", 100, CALM[::-1]))
    found = findings.describe(rows, 0.1)[0]
    assert found.startswith("bf16 wins: 2.00x the requests/s of fp32 (1.9")
    assert "x, 5 repeats), at cosine" in found
    assert "--repeats" not in found
    few = rows_of(tmp_path, repeated("fp32", 50, CALM[:4]), repeated("bf16", 100, CALM[:4]))
    assert findings.describe(few, 0.1)[0].startswith("bf16 is fastest in these 4 runs: 2.00x")


def test_what_repeats_leave_open_is_given_with_its_interval_and_the_repeats_it_needs(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, repeated("fp32", 50, CALM), repeated("bf16", 100, CALM), repeated("fp16", 93, NOISY))
    found = findings.describe(rows, 0.1)[0]
    assert found.startswith("bf16 is faster: 2.00x the requests/s of fp32")
    assert re.search(
        r"; bf16 has 1.0\dx the requests/s of fp16 \(0.9\dx to 1.\d\dx, 5 repeats\), and it takes \d+ ", found
    )
    same = rows_of(tmp_path, repeated("bf16", 100, CALM), repeated("fp16", 100.1, CALM))
    assert findings.describe(same, 0.1)[0] == (
        "No clear difference between fp16 and bf16 in 5 repeats: fp16 has 1.00x the requests/s of bf16 (1.00x to "
        "1.00x, 5 repeats)."
    )


@pytest.mark.parametrize("loop", ["closed", "open"])
@pytest.mark.parametrize(("configurations", "least"), [(2, 0.93), (3, 0.9), (5, 0.8)])
def test_equal_configurations_rarely_win_and_a_faster_one_does(configurations: int, loop: str, least: float) -> None:
    """Before, one of two equals won in 4.9% (closed loop) and 5.2% (open), and the faster of five in 68% and 19%."""
    _, equal = winners.shares(configurations, loop, 0.08, 1.0, trials=700, seed=1)
    assert equal <= 0.045
    wins, _ = winners.shares(configurations, loop, 0.025, 1.15, trials=200, seed=1)
    assert wins >= least


BAD_QUALITY = {**document("x", 1, 1)["quality"], "passes": False, "recall_at_10": 0.5}
INVALID_RUN = {"valid": False, "reasons": ["client too busy"], "cautions": []}
REJECTING = {"summary": {**summary.summarize([rejecting(20)]), "requests_per_s": 300}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quality": BAD_QUALITY}, ("Only fp32 can be recommended", "int8 fails the quality check")),
        (REJECTING, ("Only fp32 can be recommended", "met by fp32; not met by int8.")),
        ({"validity": INVALID_RUN}, ("fp32: 100.0 requests/s, cosine",)),
    ],
)
def test_a_faster_configuration_that_is_not_sound_cannot_win(
    tmp_path: Path, change: dict[str, Any], said: tuple[str, ...]
) -> None:
    limit = {"p99_ms": 50}
    rows = rows_of(tmp_path, document("fp32", 100, 10, slo=limit), document("int8", 300, 4, slo=limit) | change)
    found = findings.describe(rows, 0.1)
    assert found[0].startswith(said[0])
    assert all(words in " ".join(found) for words in said)
    assert (caveats.caveats(rows)[:1] == [Caveat("invalid", "int8: client too busy")]) == ("validity" in change)


def lognormal(name: str, median: float, sigma: float, responses: int, random: Any, repeats: int = 5) -> MeasuredRow:
    """Return the row of an open loop of 20 requests/s with log-normal latencies; runs differ by 1%."""
    runs = [median * random.lognormal(0, sigma, responses) * math.exp(random.normal(0, 0.01)) for _ in range(repeats)]
    pooled, each = summary.latency_summary(runs), [summary.latency_summary([run]) for run in runs]
    return MeasuredRow(
        name,
        "measured",
        mode="open",
        valid=True,
        receipt="r",
        quality={"checked": False, "reason": "simulated"},
        requests_per_s=20,
        p50_ms=pooled["p50"]["value"],
        p99_ms=pooled["p99"]["value"],
        p50_interval_ms=(pooled["p50"]["low"], pooled["p50"]["high"]),
        p99_interval_ms=(pooled["p99"]["low"], pooled["p99"]["high"]),
        runs=[RunFigures(i, 20, run["p50"]["value"], run["p99"]["value"]) for i, run in enumerate(each)],
    )


@pytest.mark.parametrize(
    ("responses", "a", "b", "expected"),
    [
        # The true p50 of B is 1.25x that of A, its p99 is 0.49x. Runs of 300 responses have no p99.
        (300, (10, 0.6), (12.5, 0.2), r"A wins: (\d\d)% of the p50 of B \((\d+)% to (\d+)%, 5 repeats\)"),
        (400, (10, 0.6), (12.5, 0.2), r"B wins: (\d+)% of the p99 of A \((\d+)% to (\d+)%, 5 repeats\)"),
        # B is better in both.
        (300, (20, 0.5), (18, 0.2), r"B wins: (\d\d)% of the p50 of A \((\d+)% to (\d+)%, 5 repeats\)"),
    ],
)
def test_the_ranked_tested_and_printed_figures_are_the_same(
    responses: int, a: tuple[float, float], b: tuple[float, float], expected: str
) -> None:
    random, matching = np.random.default_rng(1), 0
    for _ in range(50):
        rows = [lognormal("A", *a, responses, random), lognormal("B", *b, responses, random)]
        said, *others = findings.describe(rows, 0.1)
        assert ("The p50 is compared, since not every run has the 368 responses of a p99." in others) is (
            responses < 368
        )
        if match := re.match(expected, said):
            matching += 1
            figure, low, high = map(int, match.groups())
            assert low <= figure <= high
    assert matching >= 40


def test_a_p99_is_not_compared_with_a_p50() -> None:
    """In one run, B has 300 responses and so no p99; its p50 of 15 ms is below the p99 of A."""
    random = np.random.default_rng(1)
    rows = [lognormal("A", 10, 0.5, 400, random, 1), lognormal("B", 15, 0.2, 300, random, 1)]
    said, *others = findings.describe(rows, 0.1)
    assert said.startswith("A is fastest in this run: ")
    assert "% of the p50 of B" in said
    assert "since not every configuration has the 368 responses of a p99" in others[0]


def test_closed_loops_and_stages_are_given_with_intervals(tmp_path: Path) -> None:
    def loop(rate: float, runs: int, over: str) -> dict[str, Any]:
        interval = {"low": 0.8 * rate, "high": 1.2 * rate, "over": over}
        figures = {"requests_per_s": rate, "requests_per_s_interval": interval, "runs": runs}
        return {"users": 8, "reference_rps": 100, **figures}

    def stage(name: str, rate: float, p99: float) -> dict[str, Any]:
        figures = {"p99": {"value": p99, "low": 0.7 * p99, "high": 1.6 * p99}, "p50": {"value": None}}
        return {"name": name, "rate": rate, "users": None, "errors": {}, "requests": 400, "latency_ms": figures}

    a, b = rows_of(tmp_path, document("a", 20, 10), document("b", 20, 10))
    a = dataclasses.replace(
        a, closed_loop=loop(100, 1, "windows"), stages=[stage("start", 20, 20), stage("spike", 100, 21)]
    )
    b = dataclasses.replace(
        b, closed_loop=loop(112, 5, "runs"), stages=[stage("start", 20, 20), stage("spike", 100, 80)]
    )
    found = findings.describe([a, b], 0.1)
    rates = "a 100.0 (80.0 to 120.0, within 1 run), b 112.0 (89.6 to 134.4, 5 runs)"
    assert any(text.startswith(f"Requests/s in a closed loop of 8 users: {rates}.") for text in found)
    before = "p99 20.0 ms (14.0 to 32.0) before"
    assert f"a at 5x the rate: {before}, 21.0 ms (14.7 to 33.6) in spike (1 repeat), no clear difference." in found
    assert f"b at 5x the rate: {before}, 80.0 ms (56.0 to 128.0) in spike (1 repeat)." in found


def test_layout_of_a_receipts_file_is_not_sealed(tmp_path: Path) -> None:
    (written,) = sealed(tmp_path, document("bf16", 100, 10))
    written.path.write_text(json.dumps(json.loads(written.path.read_text()), sort_keys=True))
    assert receipt.load(written.path).name == "bf16"


VALID = MeasuredRow("bf16", "measured", valid=True, receipt="r.json")
INVALID = MeasuredRow("fp16", "measured", receipt="r.json", reasons=["3 of 90 requests failed"])


@pytest.mark.parametrize(
    ("rows", "kind", "words"),
    [
        ([VALID], None, ()),
        ([INVALID], InvalidRunError, ()),
        ([Row("a", "not run", "x")], InferctlError, ()),
        ([VALID, INVALID], InvalidRunError, ("1 of 2 configurations", "fp16: 3 of 90 requests failed")),
    ],
)
def test_how_a_bench_ends(
    tmp_path: Path, rows: list[Row], kind: type[InferctlError] | None, words: tuple[str, ...]
) -> None:
    problem = result.problem(with_rows(tmp_path, *rows))
    assert (type(problem) if problem else None) is kind
    assert all(each in (problem.message if problem else "") for each in words)


def test_of_tied_configurations_the_closest_to_fp32_is_named_first(tmp_path: Path) -> None:
    exact = document("fp16", 98, 10)
    exact["quality"] = {**exact["quality"], "cosine": {"mean": 1.0, "p1": 1.0, "min": 1.0}}
    rows = rows_of(tmp_path, document("int8", 100, 10), exact, document("fp32", 50, 20))
    headline, better, *_ = findings.describe(rows, 0.1)
    assert "; no clear difference between fp16 and int8 in this run: int8 has 1.02x" in headline
    assert better.startswith("fp16 has the better quality: cosine 1.00000")


def test_the_slo_is_judged_by_the_interval_and_what_it_leaves_open_is_said(tmp_path: Path) -> None:
    p99 = document("d", 100, 15)["summary"]["latency_ms"]["p99"]
    slo = {"p99_ms": (p99["low"] + p99["high"]) / 2}
    figures = {"a": (100, 20), "b": (100, 10), "c": (8, 10), "d": (100, 15)}
    rows = rows_of(tmp_path, *(document(name, *values, slo=slo) for name, values in figures.items()))
    (said,) = [text for text in findings.describe(rows, 0.1) if text.startswith("SLO ")]
    assert "met by b; not met by a; inconclusive for c (not enough samples for a p99: 80 of 368), d (p99 " in said
    assert [row.slo.met for row in rows if row.slo] == [False, True, None, None]


def test_a_sample_that_bounds_its_own_interval_does_not_meet_the_slo() -> None:
    """Of a thousand responses, some consecutive ones are slow, so the effective sample size is too small."""
    slow = [row(10 * i, 50 if 400 <= i < 405 else 5) for i in range(1000)]
    found = summary.summarize([summary.RunRecords(table(*slow), 0, 11 * SECOND, 1)])["latency_ms"]
    assert found["p99"]["high"] <= 60
    judged_slo = slo.judge(found, 60, 0, 0)
    assert judged_slo.met is None
    assert "the effective sample size is" in judged_slo.reason


UNCHECKED = {"checked": False, "reason": "no weights"}


@pytest.mark.parametrize(("one", "other"), [(UNCHECKED, UNCHECKED), (UNCHECKED, None), (None, UNCHECKED), (None, None)])
def test_no_tied_configuration_is_called_better_where_quality_is_unknown_or_equal(
    tmp_path: Path, one: dict[str, Any] | None, other: dict[str, Any] | None
) -> None:
    documents = document("bf16", 100, 10), document("int8", 101, 10)
    for made, quality_ in zip(documents, (one, other), strict=True):
        made["quality"] = quality_ or made["quality"]
    found = findings.describe(rows_of(tmp_path, *documents), 0.1)
    assert "No clear difference" in found[0]
    assert "better quality" not in found[0]


def context(folder: Path, **changes: Any) -> Bench:
    gpu = environment.Gpu("Tesla T4", "t4", 1, "1")
    machine = dataclasses.replace(MACHINE, hardware="t4", name="Tesla T4", gpus=(gpu,))
    given: dict[str, Any] = {"plan": plan.read_plan("quick"), "targets": [], "command": None, "model": None}
    given |= {"model_source": "test", "hardware_wanted": ["cpu", "t4"], "environment": machine, "output": folder}
    return Bench(**given | changes)


def test_a_gpu_that_no_server_used_was_not_measured(tmp_path: Path) -> None:
    written = sealed(tmp_path, document("bf16", 100, 10))
    outcomes = [Outcome(BenchTarget("bf16", "bf16"))]
    found = result.collect(context(tmp_path), outcomes, written, tmp_path / "x").rows
    assert [(one.configuration, one.outcome) for one in found] == [
        ("bf16", "measured"),
        ("t4", "not measured here"),
    ]
    assert found[1].reason == "the hardware measured is Test CPU"


def test_what_a_silent_server_ran_on_is_not_guessed(tmp_path: Path) -> None:
    machine = context(tmp_path).environment
    assert receipts.hardware_of({}, BenchTarget("a", "bf16"), machine)["key"] is None


def outcome_of(folder: Path, *parts: summary.RunRecords, subject: BenchTarget | None = None, **info: Any) -> Outcome:
    given, sent = subject or BenchTarget("bf16", "bf16"), WorkloadRecord(corpus="own.txt")
    rest = ({"steady": True}, {}, folder, info, 100_002)
    runs = [Measurement(plan.Run(given.name, i), 0.0, part, *rest, workload=sent) for i, part in enumerate(parts)]
    return Outcome(given, runs, planned=len(runs))


def change(outcome: Outcome, number: int, **changes: Any) -> None:
    outcome.measurements[number] = dataclasses.replace(outcome.measurements[number], **changes)


def with_rows(folder: Path, *listed: Row) -> result.Result:
    return dataclasses.replace(result.collect(context(folder), [], [], folder / "x"), rows=listed)


def test_a_receipt_names_the_spec_source_and_no_folder_of_the_user(tmp_path: Path) -> None:
    home = Path.home()
    path = f"{home}/models/mini"
    info = {"model_id": path, "model": {"source": path, "sha256": "a"}, "note": f"below {home}/models"}
    outcome = outcome_of(tmp_path, steady(100, 10), **info)
    chosen = plan.read_plan("quick").model_copy(update={"corpus": str(tmp_path / "own.txt")})
    (tmp_path / "own.txt").write_text("a text\n")
    for source, shown in (("org/mini", "org/mini"), (f"{home}/models/mini", "mini"), (str(tmp_path), tmp_path.name)):
        (written,) = write_all(context(tmp_path, plan=chosen, model_source=source), [outcome])
        assert written.data["model"]["source"] == shown
        assert written.data["plan"]["corpus"] == written.data["workload"]["corpus"] == "own.txt"
        assert f"{home}/" not in written.path.read_text()
        assert written.data["server"]["note"] == "below ~/models"


def test_no_receipt_names_the_folder_of_what_failed(tmp_path: Path) -> None:
    outcome, given = outcome_of(tmp_path, steady(100, 10)), context(tmp_path)
    change(outcome, 0, load=given.plan.load)
    outcome.failure = f"there is no space left in {tmp_path}/cache, says http://10.0.0.7/a/b"
    written = write_all(given, [outcome])
    assert str(tmp_path) not in written[0].path.read_text()
    data = written[0].data
    assert data["validity"]["reasons"][-1] == "there is no space left in cache, says http://10.0.0.7/a/b"
    found = result.collect(given, [outcome], written, tmp_path / "report.html").as_dict()
    row = {key: value for key, value in found["rows"][0].items() if key != "receipt"}
    assert str(tmp_path) not in json.dumps([row, found["finding"], found["findings"], found["caveats"], found["load"]])


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("the log is /var/log/x/server.log: it ended", "the log is server.log: it ended"),
        ("FileNotFoundError: '/mnt/data/mini'", "FileNotFoundError: 'mini'"),
        ("neither GET /info nor GET /v1/models names a model", "neither GET /info nor GET /v1/models names a model"),
        ("http://10.0.0.7:8080/a/b says 12/11/2026, 3 req/s", "http://10.0.0.7:8080/a/b says 12/11/2026, 3 req/s"),
        ({"a": ["/x/y/", 1]}, {"a": ["y", 1]}),
        ("no such folder: '/data 2/secret/model'", "no such folder: 'model'"),
        ("cannot read '/srv/team a/models/mini/x.json', try again", "cannot read 'x.json', try again"),
        ('"/srv/bob\'s models/mini/" and `/data 2/x`', '"mini" and `x`'),
        ("'/usr/bin/python -m tool /srv/secret/x' failed", "'python -m tool x' failed"),
        ("'/one' and '/two', then '/v1/models/x y'", "'/one' and '/two', then '/v1/models/x y'"),
        ("loads file:/srv/secret/model", "loads model"),
        ("loads file:///srv/secret/model, 'file:///srv/team a/mini'", "loads model, 'mini'"),
        ("profile: /srv/secret/model", "profile: model"),
    ],
)
def test_of_paths_in_messages_only_the_last_part_is_kept(said: Any, kept: Any) -> None:
    assert privacy.without_folders(said) == kept


def test_of_a_file_with_lengths_only_the_name_is_kept(tmp_path: Path) -> None:
    load = {"generation": {"lengths": "/srv/secret/monday.csv", "ttft_ms": 9}}
    assert privacy.without_lengths_folder(load) == {"generation": {"lengths": "monday.csv", "ttft_ms": 9}}
    (made,) = sealed(tmp_path, document("bf16", 100, 10))
    found = rows.of_outcome(Outcome(BenchTarget("bf16", "bf16", load=load)), made).as_dict()
    assert found["workload"][1] == {"generation": {"lengths": "monday.csv", "ttft_ms": 9}}


def test_home_is_replaced_as_a_folder_only() -> None:
    given = {"a": ["/users/u/x", "/users/us/x", 1], "b": "in /users/u: y"}
    assert privacy.without_home(given, Path("/users/u")) == {"a": ["~/x", "/users/us/x", 1], "b": "in ~: y"}
    assert privacy.without_home(given, Path("/")) == given


def test_the_plan_of_a_measured_url_asks_for_no_precision(tmp_path: Path) -> None:
    subjects = [BenchTarget("mine", url="http://10.0.0.7:8080"), BenchTarget("bf16", "bf16")]
    outcome = outcome_of(tmp_path, steady(100, 10), subject=subjects[0], device={"name": "Tesla T4", "hardware": "t4"})
    (written,) = write_all(context(tmp_path, targets=subjects), [outcome])
    assert written.data["plan"]["configurations"] == [
        {"name": "mine", "url": "http://10.0.0.7:8080"},
        {"name": "bf16", "precision": "bf16"},
    ]
    assert written.data["configuration"]["this_machine"] is False
    assert written.data["precision"]["requested"] is None


def test_each_run_keeps_what_the_server_said_and_an_exchanged_server_is_invalid(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, steady(100, 10), steady(100, 10), model={"sha256": "a"})
    change(outcome, 1, info={"model": {"sha256": "b"}})
    (written,) = write_all(context(tmp_path), [outcome])
    runs = [(run["server"]["model"]["sha256"], run["serial"]) for run in written.data["runs"]]
    assert runs == [("a", 100_002), ("b", 100_002)]
    (reason,) = written.data["validity"]["reasons"]
    assert reason.startswith("the runs differ in the model's sha256 (a, b)")


@pytest.mark.parametrize(("sha256", "valid"), [("a", True), ("b", False)])
def test_runs_that_were_sent_different_requests_are_not_one_configuration(
    tmp_path: Path, sha256: str, valid: bool
) -> None:
    outcome = outcome_of(tmp_path, steady(100, 10), steady(100, 10))
    for number, sent in enumerate(("a", sha256)):
        change(outcome, number, workload=WorkloadRecord(sha256=sent, corpus="own.txt"))
    (written,) = write_all(context(tmp_path), [outcome])
    assert any("a corpus changed" in reason for reason in written.data["validity"]["reasons"]) is not valid
