"""Benchmarks of rerank and classify: requests, checks of the responses, quality and reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_samples import SHORT_PLAN, bench, collected, ran
from test_foreign_servers import MODEL, Answer, Body, Serve, serve, tei, vllm
from test_runner import CHECKED, command

from inferctl.bench.load import target
from inferctl.bench.measure import quality
from inferctl.bench.measure.bench import Bench
from inferctl.bench.plan import plan, sections, workload
from inferctl.bench.report import html, terminal
from inferctl.bench.report.rows import MeasuredRow
from inferctl.config.spec_types import Task
from inferctl.core.errors import UsageError
from inferctl.facts.precision import best_precision
from inferctl.receipts import receipt
from inferctl.serve.engines import cpu

__all__ = ["serve"]
LIMITS = sections.Quality.model_validate({})


def test_a_request_has_a_query_and_16_documents_unless_the_plan_sets_a_number() -> None:
    found = plan.read_plan("quick").for_task("rerank")
    assert (found.load.task, found.load.inputs_per_request) == ("rerank", 16)
    quick = plan.read_plan("quick")
    assert quick.for_task("embed") == quick
    assert quick.for_task("classify").load == quick.load.model_copy(update={"task": "classify"})
    own = plan.Plan.model_validate(
        {"name": "own", "load": {"inputs_per_request": 5}, "configurations": [{"name": "a", "precision": "bf16"}]}
    )
    work = workload.draw(own.for_task("rerank").load, "mixed", 1)
    for query, *documents in work.groups:
        assert len(documents) == 5
        assert sum(text.startswith(query) for text in documents) >= 1
        assert len(query.split()) <= 12
    bodies = work.bodies(target.ServerConnection("http://test", "m", task="rerank").body)
    first = json.loads(bodies[0])
    assert (first["query"], first["documents"]) == (f"@SERIAL@ {work.groups[0][0]}", work.groups[0][1:])


def test_a_plan_for_another_task_is_rejected() -> None:
    configurations = [{"name": "a", "precision": "bf16"}]
    fixed = plan.Plan.model_validate({"name": "p", "load": {"task": "rerank"}, "configurations": configurations})
    with pytest.raises(UsageError, match="is for the task rerank, but the task of the model is embed"):
        fixed.for_task("embed")


def cohere(path: str, body: Body, route: str) -> Answer:
    if path != route or "documents" not in body:
        return 404, {"detail": "Not Found"}, {}
    count = len(body["documents"])
    return 200, {"results": [{"index": i, "relevance_score": i / 10} for i in reversed(range(count))]}, {}


def vllm_reranker(path: str, body: Body | None) -> Answer:
    return cohere(path, body, "/v1/rerank") if body else vllm(path, body)


def infinity_reranker(path: str, body: Body | None) -> Answer:
    return cohere(path, body, "/rerank") if body else vllm(path, body)


def tei_reranker(path: str, body: Body | None) -> Answer:
    if path == "/info":
        status, info, headers = tei(path, body)
        return status, {**info, "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}}}}, headers
    if path != "/rerank" or not body:
        return 404, {}, {}
    if "texts" not in body:
        return 422, {"error": "missing field `texts`"}, {}
    return 200, [{"index": i, "score": i / 10} for i in reversed(range(len(body["texts"])))], {}


@pytest.mark.parametrize(
    ("respond", "suffix", "path", "key"),
    [
        (vllm_reranker, "/v1/rerank", "/v1/rerank", "documents"),
        (infinity_reranker, "/rerank", "/rerank", "documents"),
        (tei_reranker, "", "/rerank", "texts"),
    ],
)
def test_rerankers_of_others_are_requested_in_their_own_form(
    serve: Serve, respond: Any, suffix: str, path: str, key: str
) -> None:
    found = target.connect(serve(respond) + suffix)
    assert found.info["api"] == {"path": path, "model": MODEL}
    assert key in found.body(["query", "one", "two"])
    assert found.rerank(["query", "one", "two", "three"]) == [0.0, 0.1, 0.2]


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 2, 4, 3], 2 / 3),  # five pairs in order, one not
        ([1, 2, 3], [1, 1, 2], 2 / 6**0.5),  # two pairs in order, one tie
        ([1, 1], [2, 2], 1.0),
        ([1, 1], [2, 3], 0.0),
    ],
)
def test_kendalls_tau_of_known_orders(first: list[float], second: list[float], tau: float) -> None:
    arrays = (np.asarray(values, np.float32) for values in (first, second))
    assert quality.kendall_tau(*arrays) == pytest.approx(tau)


def test_scores_are_compared_by_value_and_by_order() -> None:
    expected = np.asarray([[0.1, 0.5, 0.9], [0.2, 0.8, 0.4]], np.float32)
    equal = quality.compare_scores(expected, expected, LIMITS)
    assert (equal.passes, equal.kendall, equal.top_1, equal.texts) == (True, 1.0, 1.0, 6)
    moved = expected + np.asarray([[0, 0, 0], [0, -0.5, 0]], np.float32)
    found = quality.compare_scores(expected, moved, LIMITS)
    assert found.score_difference and found.score_difference["max"] == pytest.approx(0.5)
    assert found.score_difference["mean"] == pytest.approx(0.5 / 6)
    assert found.score_difference["range"] == pytest.approx((0.1, 0.9))
    assert (found.kendall, found.top_1, found.passes) == (pytest.approx((1 + 1 / 3) / 2, abs=1e-4), 0.5, False)
    # The order is right, but the scores are not: 0.05 of a range of 0.8 is within the limit of 10%, 0.2 is not.
    assert quality.compare_scores(expected, expected + np.float32(0.05), LIMITS).passes
    assert not quality.compare_scores(expected, expected + np.float32(0.2), LIMITS).passes


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


@pytest.mark.parametrize(
    ("task", "texts", "drift", "passes"),
    [("rerank", 16, 0.001, True), ("classify", 1, 0.001, True), ("classify", 1, 0.5, False)],
)
def test_scores_are_measured_and_compared_with_fp32(
    tmp_path: Path, weights: Callable[[str], tuple[Path, str]], task: Task, texts: int, drift: float, passes: bool
) -> None:
    folder, digest = weights(task)
    options = ("--task", task, "--sha256", digest, "--drift", str(drift))
    work = bench(tmp_path, "bf16", options=options, quality=CHECKED, model=folder)
    work = Bench(work.plan.for_task(task), work.targets, work.command, work.model, work.output)
    found = collected(work, ran(work))
    (row,) = found.rows
    assert isinstance(row, MeasuredRow)
    assert row.valid and row.quality["checked"] and row.quality["passes"] is passes
    assert row.tokens_per_s == pytest.approx(9 * texts * row.requests_per_s, rel=0.001)
    assert row.score_difference is not None
    order = f"{row.kendall:.3f}" if task == "rerank" else f"{row.top_1:.1%}"
    assert terminal.cells(row)[-2:] == [f"{row.score_difference:.2g}", order]
    closeness = f"scores within {row.score_difference:.2g} of fp32" if passes else "fails the quality check: score diff"
    assert any(closeness in text for text in found.findings)
    sealed = [receipt.load(Path(str(row.receipt)))]
    assert (sealed[0].task, sealed[0].data["plan"]["load"]["inputs_per_request"]) == (task, texts)
    page, notes = html.render(found, sealed), " ".join(terminal.notes(found))
    assert f"{row.score_difference:.3g}" in page
    if task == "classify":
        assert "<th>score difference</th><th>same label</th>" in page
        assert "share of texts with the same label" in notes
        return
    assert row.pairs_per_s == pytest.approx(16 * row.requests_per_s, rel=0.001)
    assert 0.0005 < row.score_difference < 0.01 and (row.kendall or 0) > 0.95
    assert "<th>pairs/s</th><th>score difference</th><th>Kendall's tau</th>" in page
    assert "16 documents per request" in page and "16 documents per request" in notes
    assert "maximum score difference" in notes


def test_servers_with_different_tasks_are_not_compared(answering: Callable[..., str], tmp_path: Path) -> None:
    urls = ["--url", f"mine={answering('--task', 'rerank')}", "--url", f"other={answering()}"]
    done = command(*urls, "--plan", SHORT_PLAN, folder=tmp_path)
    assert done.returncode == 2
    assert "the targets have different tasks: mine: rerank, other: embed" in done.stderr


@pytest.mark.slow
def test_the_real_server_is_measured_and_its_scores_are_close_to_fp32(cross_encoder: Path, tmp_path: Path) -> None:
    # bf16 where the CPU has it. Emulated, it is many times slower.
    options = ["--precision", "auto", "--duration", "2", "--json"]
    line = ["--model", str(cross_encoder), "--plan", SHORT_PLAN, *options]
    done = command(*line, folder=tmp_path)
    (row,) = json.loads(done.stdout)["rows"]
    assert row["outcome"] == "measured", row["reason"]
    assert done.returncode == (0 if row["valid"] else 5)
    assert row["task"] == "rerank" and row["precision"]["effective"] == best_precision(cpu.detect()[1])
    assert row["pairs_per_s"] == pytest.approx(16 * row["requests_per_s"], rel=0.001)
    assert row["tokens_per_s"] > 16 * row["pairs_per_s"]
    assert row["quality"]["passes"] and row["quality"]["texts"] == 96
    assert row["score_difference"] < 0.05 and row["kendall"] > 0.9
