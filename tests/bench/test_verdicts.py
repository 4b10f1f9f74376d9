"""What is concluded from the numbers: validity, quality, findings, receipts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_samples import SECOND, document, row, sealed, steady, table

from inferctl.bench import findings, plan, quality, receipt, result, runner, summary, validity
from inferctl.bench.records import TIMEOUT
from inferctl.errors import InferctlError, InvalidRunError, UsageError

LIMITS = plan.Quality.model_validate({})


def judged(part: summary.Part, **resources: float) -> validity.Validity:
    return validity.judge(summary.summarise([part]), resources, {"steady": True}, cores=2)


def test_a_calm_run_is_valid_and_needs_no_caution() -> None:
    assert judged(steady(100, 10), client_cpu_percent=89.9) == validity.Validity((), ())


def test_a_busy_load_generator_makes_a_run_invalid() -> None:
    assert "bottleneck" in judged(steady(100, 10), client_cpu_percent=90.1).reasons[0]


def test_less_than_98_per_cent_of_the_offered_rate_is_invalid() -> None:
    part = steady(97, 1)
    short = summary.Part(part.rows, part.start_ns, part.end_ns, 1, offered=1000)
    enough = summary.Part(part.rows, part.start_ns, part.end_ns, 1, offered=985)
    assert judged(short).reasons == ("answered 97.1 of 100.0 requests/s offered (97 %, limit 98 %)",)
    assert judged(enough).valid


def test_failed_requests_make_a_run_invalid() -> None:
    rows = [row(10 * i, 5) for i in range(400)] + [row(4100, 5, error=TIMEOUT)]
    assert judged(summary.Part(table(*rows), 0, 5 * SECOND, 1)).reasons == ("1 of 401 requests failed (timeout: 1)",)


def test_too_few_answers_are_invalid_and_too_few_for_p99_a_caution() -> None:
    assert judged(steady(3, 10)).reasons == ("n too small: 30 answers, 36 needed for a p90",)
    assert judged(steady(30, 10)).cautions == ("n too small for a p99: 300 of 368 answers",)


def test_pooling_runs_can_make_n_large_enough() -> None:
    parts = [steady(30, 10), steady(30, 10)]
    whole = validity.combine([judged(part) for part in parts], summary.summarise(parts))
    assert whole == validity.Validity((), ())


def test_one_invalid_run_makes_the_configuration_invalid() -> None:
    parts = [steady(100, 10), steady(100, 10)]
    each = [judged(parts[0]), judged(parts[1], client_cpu_percent=99)]
    assert validity.combine(each, summary.summarise(parts)).reasons[0].startswith("run 2: the load generator used 99 %")


def test_equal_vectors_are_perfect_whatever_their_length() -> None:
    vectors = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    found = quality.compare(vectors, 3 * vectors, LIMITS)
    assert found["cosine"] == {"mean": 1.0, "p1": 1.0, "min": 1.0}
    assert found["recall_at_10"] == 1.0
    assert found["passes"]


def test_cosine_and_recall_of_known_vectors() -> None:
    angles = np.radians([0, 10, 20, 100, 110, 120])
    expected = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    moved = np.radians([0, 10, 105, 100, 110, 120])  # the third goes over to the other group
    found = np.stack([np.cos(moved), np.sin(moved)], 1).astype(np.float32)
    # Nearest two, before: 0:{1,2} 1:{0,2} 2:{1,0} 3:{4,5} 4:{3,5} 5:{4,3}; after: 0:{1,3} 1:{0,3} 2:{3,4} 3:{2,4} 4:{2,3 or 5} 5:{4,2}.
    assert quality.recall_at(expected, found, 2) == pytest.approx((1 / 2 + 1 / 2 + 0 + 1 / 2 + 1 / 2 + 1 / 2) / 6)
    assert quality.compare(expected, found, LIMITS)["cosine"]["min"] == pytest.approx(np.cos(np.radians(85)), abs=1e-5)


def test_a_configuration_under_the_limits_fails() -> None:
    vectors = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    noisy = vectors + np.random.default_rng(2).normal(size=vectors.shape).astype(np.float32)
    assert not quality.compare(vectors, noisy, LIMITS)["passes"]


def rows_of(folder: Path, *documents: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        result._row(
            runner.Outcome(runner.Subject(one.name, one.name)), one
        )  # the rows that the command makes of receipts
        for one in sealed(folder, *documents)
    ]


def test_the_fastest_wins_by_its_ratio_and_with_its_quality(tmp_path: Path) -> None:
    found = findings.state(rows_of(tmp_path, document("fp32", 50, 20), document("bf16", 100, 10)), "closed")
    assert found[0] == "bf16 wins: 2.00x the requests/s of fp32, at cosine 0.99991 and recall@10 0.987 to fp32."


def test_differences_under_five_per_cent_are_a_tie(tmp_path: Path) -> None:
    found = findings.state(rows_of(tmp_path, document("fp32", 100, 10), document("bf16", 104, 10)), "closed")
    assert found[0].startswith("bf16 and fp32 are a tie, the difference is within the noise")


def test_overlapping_intervals_are_a_tie(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, document("fp32", 100, 10), document("bf16", 150, 10))
    for one in rows:
        one["requests_per_s_interval"] = {"low": 90, "high": 160, "over": "windows"}
    assert "tie" in findings.state(rows, "closed")[0]


def test_a_faster_configuration_that_fails_quality_cannot_win(tmp_path: Path) -> None:
    bad = document("int8", 300, 4)
    bad["quality"] = {**bad["quality"], "passes": False, "recall_at_10": 0.5}
    found = findings.state(rows_of(tmp_path, document("fp32", 100, 10), bad), "closed")
    assert found[0].startswith("fp32 ran alone")
    assert any("int8 fails on quality" in sentence and "cannot be recommended" in sentence for sentence in found)


def test_an_invalid_configuration_cannot_win(tmp_path: Path) -> None:
    invalid = document("bf16", 300, 4, validity={"valid": False, "reasons": ["client too busy"], "cautions": []})
    rows = rows_of(tmp_path, document("fp32", 100, 10), invalid)
    assert findings.state(rows, "closed")[0].startswith("fp32 ran alone")
    assert findings.caveats(rows)[0] == ("invalid", "bf16: client too busy")


def test_emulation_is_said_with_its_reason(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, document("fp16", 10, 90, level="emulated"), document("bf16", 100, 10))
    assert ("emulated", "fp16: the reason of fp16") in findings.caveats(rows)


def test_an_open_loop_compares_p99(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, document("fp32", 100, 20), document("bf16", 100, 10))
    assert findings.state(rows, "open")[0].startswith("bf16 wins: 50% of the p99 of fp32")


def test_receipts_are_sealed_and_come_back_as_written(tmp_path: Path) -> None:
    (written,) = sealed(tmp_path, document("bf16", 100, 10))
    assert receipt.load(written.path).data == written.data
    assert written.data["schema"] == "inferctl.receipt/1"


@pytest.mark.parametrize("key", ["summary", "validity", "created", "model"])
def test_an_altered_receipt_is_refused(tmp_path: Path, key: str) -> None:
    (written,) = sealed(tmp_path, document("bf16", 100, 10))
    altered = json.loads(written.path.read_text())
    altered[key] = "better"
    written.path.write_text(json.dumps(altered))
    with pytest.raises(InvalidRunError, match="altered"):
        receipt.load(written.path)


def test_layout_of_a_receipts_file_is_not_sealed(tmp_path: Path) -> None:
    (written,) = sealed(tmp_path, document("bf16", 100, 10))
    written.path.write_text(json.dumps(json.loads(written.path.read_text()), sort_keys=True))
    assert receipt.load(written.path).name == "bf16"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "inferctl.receipt/9"}'])
def test_what_is_no_receipt_of_this_version_is_a_usage_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(UsageError):
        receipt.load(file)


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([{"configuration": "a", "outcome": "measured", "receipt": "r", "valid": True, "reasons": []}], None),
        (
            [{"configuration": "a", "outcome": "measured", "receipt": "r", "valid": False, "reasons": ["x"]}],
            InvalidRunError,
        ),
        (
            [
                {
                    "configuration": "a",
                    "outcome": "not run",
                    "receipt": None,
                    "valid": False,
                    "reasons": [],
                    "reason": "x",
                }
            ],
            InferctlError,
        ),
    ],
)
def test_how_a_bench_ends(rows: list[dict[str, Any]], kind: type[InferctlError] | None) -> None:
    problem = result.verdict({"rows": rows, "output": "out"})
    assert (type(problem) if problem else None) is kind


def test_of_tied_configurations_the_closest_to_fp32_is_named_first(tmp_path: Path) -> None:
    exact = document("fp16", 98, 10)
    exact["quality"] = {**exact["quality"], "cosine": {"mean": 1.0, "p1": 1.0, "min": 1.0}}
    found = findings.state(rows_of(tmp_path, document("int8", 100, 10), exact, document("fp32", 50, 20)), "closed")
    assert found[0].startswith(
        "fp16 and int8 lead in a tie: 2.00x the requests/s of fp32; fp16 has the better quality: cosine 1.00000"
    )


def test_who_holds_the_slo_is_said(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, document("fp32", 100, 20), document("bf16", 200, 10))
    assert "At this load the SLO (p99 15 ms) holds for bf16." in findings.state(rows, "closed", 15)
    assert "At this load the SLO (p99 5 ms) holds for none of them." in findings.state(rows, "closed", 5)
