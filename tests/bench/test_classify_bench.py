"""Benchmarks of classifiers: quality, reports and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_runner import CHECKED, bench, collected, ran

from inferctl.bench.measure import quality
from inferctl.bench.measure.bench import Bench
from inferctl.bench.plan import plan, sections
from inferctl.bench.report import html, terminal
from inferctl.bench.report.rows import MeasuredRow
from inferctl.receipts import receipt

LIMITS = sections.Quality.model_validate({})


@pytest.mark.parametrize(
    ("found", "passes", "top_1", "largest"),
    [
        ([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]], True, 1.0, 0.0),
        ([[0.7, 0.3], [0.2, 0.8], [0.45, 0.55]], True, 1.0, 0.05),  # both labels are best ones in fp32
        ([[0.68, 0.32], [0.15, 0.85], [0.5, 0.5]], True, 1.0, 0.05),
        ([[0.6, 0.4], [0.2, 0.8], [0.5, 0.5]], False, 1.0, 0.1),  # of a range of 0.6, the limit is 10%
        ([[0.7, 0.3], [0.51, 0.49], [0.5, 0.5]], False, 0.6667, 0.31),
    ],
)
def test_scores_of_labels_are_compared_by_value_and_by_label(
    found: list[list[float]], passes: bool, top_1: float, largest: float
) -> None:
    expected = np.asarray([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]], np.float32)
    result = quality.compare_labels(expected, np.asarray(found, np.float32), LIMITS)
    assert (result.passes, result.top_1, result.texts) == (passes, top_1, 3)
    assert result.score_difference and result.score_difference["max"] == pytest.approx(largest, abs=1e-6)


def test_requests_of_a_classifier_have_as_many_texts_as_those_of_embeddings() -> None:
    found = plan.read_plan("quick").for_task("classify").load
    assert (found.task, found.inputs_per_request) == ("classify", plan.read_plan("quick").load.inputs_per_request)


@pytest.mark.parametrize(("drift", "passes"), [("0.001", True), ("0.5", False)])
def test_a_classifier_is_measured_and_compared_with_fp32(
    tmp_path: Path, weights: Callable[[str], tuple[Path, str]], drift: str, passes: bool
) -> None:
    folder, digest = weights("classify")
    options = ("--task", "classify", "--sha256", digest, "--drift", drift)
    work = bench(tmp_path, "bf16", options=options, quality=CHECKED, model=folder)
    work = Bench(work.plan.for_task("classify"), work.targets, work.command, work.model, work.output)
    found = collected(work, ran(work))
    (row,) = found.rows
    assert isinstance(row, MeasuredRow)
    assert row.valid and row.quality["checked"] and row.quality["passes"] is passes
    assert row.tokens_per_s == pytest.approx(9 * row.requests_per_s, rel=0.001)
    assert row.score_difference is not None and row.top_1 is not None
    assert terminal.cells(row)[-2:] == [f"{row.score_difference:.2g}", f"{row.top_1:.1%}"]
    assert any("share of texts with the same label" in note for note in terminal.notes(found))
    if passes:
        assert any(f"scores within {row.score_difference:.2g} of fp32" in text for text in found.findings)
    else:
        assert any("fails the quality check: score difference" in text for text in found.findings)
    sealed = [receipt.load(Path(str(row.receipt)))]
    page = html.render(found, sealed)
    assert "<th>score difference</th><th>same label</th>" in page and f"{row.score_difference:.3g}" in page
