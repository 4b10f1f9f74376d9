"""Retrieval on judged collections: reading, measures, statistics, and complete benchmarks with the answering server."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from bench_samples import SHORT_PLAN, bench, ran
from compare_samples import receipts_of, run_values
from test_schemas import check

from inferctl import cli
from inferctl.bench.judge import compare as comparing
from inferctl.bench.judge import retrieval as judging
from inferctl.bench.judge.comparable import ReceiptPair
from inferctl.bench.load.http_json import ServerAccess, StatusError
from inferctl.bench.load.target import ServerConnection
from inferctl.bench.measure import retrieval
from inferctl.bench.measure.bench import Progress, rerank_server
from inferctl.bench.measure.outcome import BenchTarget
from inferctl.bench.plan import collection
from inferctl.bench.report import retrieval as report
from inferctl.bench.report.receipts import write_all
from inferctl.core.errors import UsageError

pytest.importorskip("pytrec_eval")

WORDS = [f"word{number}" for number in range(60)]


def folder_of(path: Path, **files: str) -> Path:
    """Write the files of a collection, and return its folder."""
    (path / "qrels").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / {"qrels": "qrels/test.tsv", "flat": "qrels.tsv"}.get(name, f"{name}.jsonl")).write_text(text)
    return path


def lines(**texts: str | tuple[str, str]) -> str:
    """Return a JSON line for each text, or for each pair of title and text."""
    pairs = {key: ("", text) if isinstance(text, str) else text for key, text in texts.items()}
    return "".join(json.dumps({"_id": key, "title": pair[0], "text": pair[1]}) + "\n" for key, pair in pairs.items())


def qrels(*rows: str) -> str:
    return "\n".join(["query-id corpus-id score", *rows]).replace(" ", "\t") + "\n"


DOCUMENTS, QUERIES = lines(b="two", a=("One", "text"), c=""), lines(p="first", q="second", r="third")


def test_a_collection_has_joined_titles_and_only_queries_with_a_relevant_document(tmp_path: Path) -> None:
    files = {"corpus": DOCUMENTS, "queries": QUERIES, "flat": qrels("q b 2", "q a 0", "p a 1", "r b 0")}
    found = collection.read(folder_of(tmp_path / "mine", **files))
    assert found.documents == {"a": "One text", "b": "two"}
    assert found.queries == {"p": "first", "q": "second"}
    assert found.judgments == {"p": {"a": 1}, "q": {"a": 0, "b": 2}}
    assert (found.name, found.weak, found.left_out, found.empty) == ("mine", False, 1, 1)
    for number, (grades, equal) in enumerate(
        [(qrels("q b 1", "q a 0", "p a 1"), False), (files["flat"].partition("\n")[2], True)]  # without its header
    ):
        moved = collection.read(folder_of(tmp_path / str(number) / "mine", **{**files, "flat": grades}))
        assert (moved.sha256 == found.sha256) == equal


def test_documents_alone_give_weak_queries_that_they_do_not_contain(tmp_path: Path) -> None:
    corpus = lines(a=("Red", "apple"), b="Blue sky\nis wide\nand far", c=("Red", "car"), d="one line")
    found = collection.read(folder_of(tmp_path, corpus=corpus))
    assert found.weak
    assert found.documents == {"a": "apple", "b": "is wide\nand far", "c": "car", "d": "one line"}
    assert found.queries == {"a": "Red", "b": "Blue sky"}
    assert found.judgments == {"a": {"a": 1, "c": 1}, "b": {"b": 1}}
    many = lines(**{f"d{number:04}": (f"title {number}", "text") for number in range(2500)})
    found = collection.read(folder_of(tmp_path, corpus=many))
    assert len(found.queries) <= collection.MOST_WEAK
    assert len(found.queries) + found.left_out == 2500


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "cannot read"),
        ({"corpus": ""}, "no texts"),
        ({"corpus": '{"_id": "a"}\n'}, "corpus.jsonl:1"),
        ({"corpus": lines(a="x") + lines(a="y")}, "corpus.jsonl:2"),
        ({"corpus": lines(a="one line")}, "0 queries"),
        ({"corpus": DOCUMENTS, "qrels": qrels("q b 1")}, "queries.jsonl: No such"),
        ({"corpus": DOCUMENTS, "queries": QUERIES, "qrels": qrels("q b 1", "q b 1", "q b 0")}, "test.tsv:4: a second"),
        ({"corpus": DOCUMENTS, "queries": QUERIES}, "test.tsv"),
        ({"corpus": DOCUMENTS, "queries": QUERIES, "qrels": qrels("q b 0")}, "0 queries"),
        (
            {"corpus": DOCUMENTS, "queries": QUERIES, "qrels": qrels("q b 1", "q z 1")},
            "test.tsv:3: the judged document",
        ),
        ({"corpus": DOCUMENTS, "queries": QUERIES, "qrels": qrels("z b 1")}, "test.tsv:2: the judged query"),
        ({"corpus": DOCUMENTS, "queries": QUERIES, "qrels": qrels("q b high")}, "test.tsv:2"),
    ],
)
def test_a_contradictory_collection_is_an_error(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        collection.read(folder_of(tmp_path, **files))


def evaluated(scores: Any, grades: Any) -> tuple[dict[str, list[float]], dict[str, Any], dict[str, Any]]:
    """Return the measures of scores, shape (queries, documents), and all scores and grades in the form of trec_eval."""
    queries, names = [f"q{n:02}" for n in range(len(scores))], [f"{n:03}" for n in reversed(range(scores.shape[1]))]
    every, judged = (
        {query: dict(zip(names, row.tolist(), strict=True)) for query, row in zip(queries, each, strict=True)}
        for each in (scores.astype(float), grades)
    )
    run = retrieval.ranked(lambda a, b: scores[a:b].astype(np.float32), queries, names)
    assert {len(best) for best in run.values()} == {retrieval.DEPTH}
    return retrieval.evaluate(run, judged), every, judged


def test_measures_equal_those_of_other_implementations() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    scores, grades = draw.normal(size=(40, 300)), draw.integers(0, 4, (40, 300))
    relevant = np.take_along_axis(grades, np.argsort(-scores, axis=1), axis=1) > 0
    expected = {
        "ndcg_at_10": [metrics.ndcg_score([row], [each], k=10) for row, each in zip(grades, scores, strict=True)],
        "mrr_at_10": np.where(relevant[:, :10].any(axis=1), 1 / (1 + relevant[:, :10].argmax(axis=1)), 0),
        **{f"recall_at_{k}": relevant[:, :k].sum(axis=1) / relevant.sum(axis=1) for k in (10, 100)},
    }
    found, *_ = evaluated(scores, grades)
    assert {*expected} == {*found}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("levels", [1, 2, 7])
def test_ties_are_cut_in_the_order_of_trec_eval(levels: int) -> None:
    import pytrec_eval

    draw = np.random.default_rng(levels)
    found, every, judged = evaluated(draw.integers(0, levels, (30, 400)), draw.integers(0, 2, (30, 400)))
    uncut = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut_10", "recall_100", "recip_rank"}).evaluate(every).values()
    assert found["ndcg_at_10"] == [query["ndcg_cut_10"] for query in uncut]
    assert found["recall_at_100"] == [query["recall_100"] for query in uncut]
    assert found["mrr_at_10"] == [query["recip_rank"] * (query["recip_rank"] >= 0.1) for query in uncut]


def test_formats_have_the_numbers_of_other_implementations() -> None:
    torch = pytest.importorskip("torch")
    vectors = np.random.default_rng(0).normal(size=(50, 37)).astype(np.float32)
    for name in ("float16", "bfloat16"):
        expected = torch.from_numpy(vectors).to(getattr(torch, name)).float().numpy()
        np.testing.assert_array_equal(retrieval.convert(vectors, name), expected)
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    np.testing.assert_allclose(retrieval.convert(vectors, "int8") / 127 * largest, vectors, atol=largest.max() / 253)
    bits = retrieval.convert(vectors, "binary")
    np.testing.assert_array_equal(bits @ bits.T, 37 - 2 * (bits[:, None] != bits[None]).sum(axis=2))
    scores = {variant.name: each(0, 50) for variant, each in retrieval._VARIANTS["dense"](vectors, vectors, ())}
    np.testing.assert_array_equal(scores["binary"], bits @ bits.T)  # equal distances are equal scores


def test_maxsim_and_sparse_scores_are_those_of_their_definitions() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    draw = np.random.default_rng(0)
    queries, documents = ([draw.normal(size=(n, 8)).astype(np.float32) for n in sizes] for sizes in ((3, 1), (5, 2, 9)))
    ((variant, scores),) = retrieval._VARIANTS["tokens"](queries, documents, ())
    expected = [[(q @ d.T).max(axis=1).sum() for d in documents] for q in queries]
    np.testing.assert_allclose(scores(0, 2), expected, rtol=1e-5)
    assert variant.bytes == 4 * 8 * 16 / 3
    queries, documents = (np.maximum(draw.normal(size=(n, 50)), 0).astype(np.float32) for n in (4, 6))
    rows = [[sparse.csr_matrix(row) for row in each] for each in (queries, documents)]
    ((variant, scores),) = retrieval._VARIANTS["sparse"](*rows, ())
    np.testing.assert_allclose(scores(1, 3), (queries @ documents.T)[1:3], rtol=1e-5)
    assert variant.bytes == 8 * np.count_nonzero(documents) / 6


def judged(path: Path, queries: int = 60) -> Path:
    """Return a collection whose queries share words with their relevant document."""
    draw = random.Random(0)
    texts = [draw.choices(WORDS, k=12) for _ in range(queries)]
    asked = {f"q{n:02}": " ".join([*text[:5], *draw.choices(WORDS, k=3)]) for n, text in enumerate(texts)}
    rows = [f"q{n:02} d{n:02} 1" for n in range(queries)]
    corpus = lines(**{f"d{n:02}": " ".join(text) for n, text in enumerate(texts)})
    return folder_of(path, corpus=corpus, queries=lines(**asked), qrels=qrels(*rows))


def test_a_benchmark_shows_quality_next_to_speed_and_compare_judges_it(
    answering: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = (("good", "0"), ("bad", "1"))
    urls = [f"--url={name}={answering('--median-ms', '1', '--drift', drift)}" for name, drift in sides]
    rerank = answering("--median-ms", "1", "--task", "rerank")
    line = ["bench", *urls, "--retrieval", str(judged(tmp_path / "mine")), "--rerank", rerank, "--dimensions", "16"]
    assert cli.run([*line, "--plan", SHORT_PLAN, "--output", str(tmp_path / "results")]) == 0
    (folder,) = (tmp_path / "results").iterdir()
    result = json.loads((folder / "result.json").read_text())
    check("bench", result)
    rows = {(row["configuration"], row["name"]): row for row in result["retrieval"]}
    good, bad = rows["good", "float32"], rows["bad", "float32"]
    assert {"float32", "float16", "bfloat16", "int8", "binary", "int8-16", "reranked"} <= {name for _, name in rows}
    assert (good["bytes"], rows["good", "int8-16"]["bytes"], rows["good", "binary"]["bytes"]) == (128, 16, 4)
    assert good["ndcg_at_10"] > bad["ndcg_at_10"] > 0
    assert bad["difference"]["outcome"] == "regression"
    assert bad["difference"]["low"] <= bad["difference"]["points"] <= bad["difference"]["high"] < 0
    assert bad["difference"]["points"] == pytest.approx(100 * (bad["ndcg_at_10"] - good["ndcg_at_10"]), abs=1e-3)
    # The reranker has the scores of the good server, so it cannot change its order.
    assert rows["good", "reranked"]["ndcg_at_10"] == pytest.approx(good["ndcg_at_10"], abs=1e-6)
    assert rows["bad", "reranked"]["difference"]["points"] > 0
    assert "nDCG@10" in result["finding"]
    page, printed = (folder / "report.html").read_text(), capsys.readouterr().out
    assert "Quality and speed" in page
    assert "int8-16" in printed
    receipts = [folder / "receipts" / f"{name}.json" for name in ("good", "bad")]
    for receipt in receipts:
        check("receipt", json.loads(receipt.read_text()))
        assert "word1" not in receipt.read_text()
    arguments = [*map(str, receipts), "--metric", "ndcg_at_10", "--json"]
    assert cli.run(["compare", *arguments]) == 1
    found = json.loads(capsys.readouterr().out)
    check("compare", found)
    verdicts = {metric["name"]: metric for pair in found["configurations"] for metric in pair["metrics"]}
    assert verdicts["ndcg_at_10"]["outcome"] == "regression"
    assert verdicts["ndcg_at_10"]["difference"] == bad["difference"]["points"]
    assert cli.run(["compare", *arguments, "--floor-ndcg", "99"]) in (0, 4)


class Picky(ServerConnection):
    """A server that is busy, then fails, and accepts no `input_type`."""

    def embed(self, texts: list[str], *rest: Any, **more: Any) -> list[tuple[float, ...]]:
        if (number := next(self.info["calls"])) < 2:
            raise StatusError((429, 500)[number], "busy")
        if "input_type" in more:
            raise StatusError(400, "unknown key")
        return [tuple(map(float, f"{len(text):08b}")) for text in texts]


def test_a_busy_server_is_asked_again_and_one_without_roles_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "_WAITS_S", (0, 0))
    server = Picky("http://127.0.0.1:1", "m", {"calls": itertools.count()})
    found = retrieval.measure(server, collection.read(judged(tmp_path)), (), lambda passed: None)
    assert (found.reason, found.roles, found.truncated) == (None, False, None)
    assert len(found.variants) == len(retrieval.FORMATS)


@pytest.mark.parametrize("phase", ["embedding the collection", "reranking"])
def test_what_was_interrupted_has_a_reason(answering: Callable[..., str], tmp_path: Path, phase: str) -> None:
    judgments = collection.read(judged(tmp_path / "mine", 40))
    work = replace(bench(tmp_path, "fp32"), collection=judgments, rerank=answering("--task", "rerank"))

    def notify(progress: Progress) -> None:
        if progress.phase == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran(work, notify, lambda outcome: write_all(work, [outcome]))
    kept = json.loads((tmp_path / "receipts" / "fp32.json").read_text())["retrieval"]
    assert (len(kept["variants"]) > 0, "interrupted" in kept["reason"]) == (phase == "reranking", True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rerank --retrieval={mine}", "the task of the model is rerank"),
        ("embed --rerank=http://127.0.0.1:1", "need a collection"),
        ("embed --retrieval={mine} --rerank=http://127.0.0.1:1", "cannot connect"),
        ("embed --retrieval={mine} --rerank={model}", "a model for embed that cannot rank"),
    ],
)
def test_what_cannot_be_measured_is_an_error_before_the_load(
    answering: Callable[..., str], minilm: Path, tmp_path: Path, capsys: Any, options: str, message: str
) -> None:
    task, *more = options.format(mine=judged(tmp_path / "mine", 5), model=minilm).split()
    assert cli.run(["bench", f"--url=a={answering('--task', task)}", *more, "--plan", SHORT_PLAN]) in (2, 3)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("same", [True, False])
def test_keys_are_sent_to_a_reranker_at_the_origin_of_a_server_only(answering: Callable[..., str], same: bool) -> None:
    url = answering("--task", "rerank")
    target = BenchTarget("a", url=f"{url}/v1" if same else "http://127.0.0.1:1")
    found = rerank_server(url, ServerAccess({"Authorization": "Bearer secret"}, "other"), [target])
    assert (bool(found.access.headers), found.model == "other") == (same, False)


def values_of(draw: np.random.Generator, count: int, gain: float = 0.0, shared: float = 0.7) -> list[list[float]]:
    """Return nDCG of the same queries by two equal systems, the second one `gain` better; most are 0 or 1."""
    ranks = draw.geometric(0.25, (3, count))
    systems = [np.where(draw.random(count) < shared, ranks[2], ranks[side]) for side in (0, 1)]
    found = [np.where(each <= 10, 1 / np.log2(1 + each), 0.0) for each in systems]
    return [found[0].tolist(), (found[1] + gain).tolist()]


@pytest.mark.parametrize("queries", [50, 300])
def test_equal_systems_get_false_verdicts_in_at_most_5_percent_of_comparisons(queries: int) -> None:
    draw = np.random.default_rng(queries)
    outcomes = [judging.difference(*values_of(draw, queries), 0.0, 0.05).outcome for _ in range(400)]
    false = sum(outcome in ("regression", "improvement") for outcome in outcomes)
    assert false <= 0.05 * 400 + 2 * (400 * 0.05 * 0.95) ** 0.5


def test_the_queries_needed_show_a_difference_with_the_power_that_they_promise() -> None:
    """For 3 points, a ninth of the queries that one point needs."""
    draw = np.random.default_rng(1)
    needed = judging.difference(*values_of(draw, 20_000), 1.0, 0.05).queries_needed
    found = [judging.difference(*values_of(draw, -(-needed // 9), -0.03), 1.0, 0.05) for _ in range(400)]
    power = sum(each.outcome == "regression" for each in found) / len(found)
    assert abs(power - 0.8) < NormalDist().inv_cdf(0.999) * (0.16 / len(found)) ** 0.5


@pytest.mark.parametrize(
    ("old", "new", "outcome", "reason"),
    [
        ([0.5] * 200, [0.5] * 200, "no regression", ""),
        ([0.5] * 100, [0.5] * 100, "not enough evidence", "cannot be excluded"),  # 3% of other queries may be lost
        ([0.5] * 100, None, "not enough evidence", "without `--retrieval`"),
        (None, [0.5] * 100, "not compared", "without `--retrieval`"),
        ([0.5, 0.4] * 10, [0.1, 0.0] * 10, "not enough evidence", "20 queries"),
        ([0.5] * 100, [0.5] * 99, "not enough evidence", "collections differ"),
        ([0.1, 0.9] * 50, [0.9, 0.1] * 50, "not enough evidence", "needs about"),
    ],
)
def test_compare_says_why_there_is_no_verdict(
    tmp_path: Path, old: list[float] | None, new: list[float] | None, outcome: str, reason: str
) -> None:
    sides = receipts_of(tmp_path, *[run_values(8, [1, 1.01, 0.99])] * 2)
    for side, values in zip(sides, (old, new), strict=True):
        first = {"per_query": values, "ndcg_at_10": values and sum(values) / len(values)}
        collected = {"sha256": str(len(values or ())), "weak": True}
        side.data["retrieval"] = values and {"collection": collected, "variants": [first]}
    (pair,) = comparing.compare([ReceiptPair(*sides)], [], comparing.CompareOptions()).pairs
    (metric,) = (each for each in pair.metrics if each.name == judging.NAME)
    assert metric.outcome == outcome
    assert reason in metric.reason
    assert any("weak" in note for note in pair.notes) == bool(new)
    only = comparing.compare([ReceiptPair(*sides)], [], comparing.CompareOptions(metrics=["memory"]))
    assert judging.NAME not in {each.name for each in only.pairs[0].metrics} and only.family == 1


@pytest.mark.parametrize(
    ("losses", "variants", "outcome", "part"),
    [
        ([0.4] * 20, 2, "not enough evidence", "too few judged queries"),
        ([0.2, -0.2] * 100, 2, "not enough evidence", "one point needs"),
        ([0.05, -0.014] * 1000, 2, "regression", "is worse than"),
        ([0.1, -0.084] * 500, 2, "not enough evidence", "is worse, perhaps"),
        ([0.05, -0.05] * 120, 2, "no regression", "is within"),
        ([0.05, -0.05] * 120, 40, "not enough evidence", "not shown to be better or worse"),  # joint intervals
    ],
)
def test_a_sentence_says_what_intervals_show(
    tmp_path: Path, losses: list[float], variants: int, outcome: str, part: str
) -> None:
    sides = receipts_of(tmp_path, *[run_values(8, [1, 1.01, 0.99])] * 2)
    for side, loss in zip(sides, ([0.0] * len(losses), losses), strict=True):
        kind = {"name": "float32", "bytes": 4, "milliseconds": None, "per_query": [0.5 - each for each in loss]}
        side.data["summary"] = {"requests_per_s": 1.0, "requests_per_s_interval": None}
        side.data["retrieval"] = {"collection": dict.fromkeys(("queries", "name", "weak"), 0), "variants": [kind]}
    sides[0].data["retrieval"]["variants"] *= variants
    rows = report.rows(sides)
    assert rows[-1].difference and rows[-1].difference.outcome == outcome
    assert any(text.startswith(sides[1].name) and part in text for text in report.sentences(rows, sides))
