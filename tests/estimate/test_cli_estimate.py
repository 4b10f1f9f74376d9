"""Tests the command `inferctl estimate`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from inferctl.cli import estimate
from inferctl.estimate import forecast, front_end

BERT = {
    "model_type": "bert",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def _few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a tenth of the requests, which is sufficient for the tolerances here."""
    monkeypatch.setattr(forecast, "Scenario", functools.partial(forecast.Scenario, count=forecast.REQUESTS // 10))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    return "config.json"


MINILM = BERT | {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def estimated(capsys: pytest.CaptureFixture[str], config: str, *arguments: str) -> dict[str, Any]:
    assert cli.run(["estimate", "--config", config, *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_other_outputs_than_dense_vectors_are_not_estimated(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config).write_text(json.dumps(BERT | {"architectures": ["HF_ColBERT"]}))
    assert cli.run(["estimate", "--config", config, "--hardware", "t4"]) == 2
    assert "a multi-vector model" in capsys.readouterr().err


def test_a_cross_encoder_is_not_estimated(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config).write_text(json.dumps(BERT | {"architectures": ["BertForSequenceClassification"], "num_labels": 1}))
    assert cli.run(["estimate", "--config", config, "--hardware", "t4"]) == 2
    told = capsys.readouterr().err
    assert "config.json is of a reranker (BertForSequenceClassification)" in told
    assert "hint: measure a reranker with `inferctl bench`" in told
    Path(config).write_text(json.dumps(BERT | {"architectures": ["BertForSequenceClassification"]}))
    assert cli.run(["estimate", "--config", config, "--hardware", "t4"]) == 2
    told = capsys.readouterr().err
    assert "config.json is of a classifier (BertForSequenceClassification)" in told
    assert "hint: measure a classifier with `inferctl bench`" in told


def test_a_generative_model_is_estimated_only_if_it_is_made_for_embeddings(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(config).write_text(json.dumps(MINILM | {"architectures": ["Qwen3ForCausalLM"]}))
    assert cli.run(["estimate", "--config", config, "--hardware", "t4"]) == 2
    told = capsys.readouterr().err
    assert "config.json is of a generative model (Qwen3ForCausalLM)" in told
    assert "an embedding model has a modules.json in its folder" in told
    (Path(config).parent / "modules.json").write_text("[]")
    assert estimated(capsys, config, "--hardware", "t4")


def test_figures_are_labeled_estimated_and_are_bounds(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--hardware", "t4,cpu", "-p", "int8", "--length", "squad", "--slo-p99-ms", "130")
    said = estimated(capsys, config, *arguments)
    assert said["schema"] == "inferctl.estimate/3"
    (row,) = said["rows"]
    assert said["estimated"] is True and row["outcome"] == "estimated"
    for key, published in (("offline_texts_per_s", 440), ("highest_rate", 383)):  # MLPerf v0.7: 437 to 445, 380 to 387
        assert (row[key]["bound"], row[key]["value"], row[key]["low"]) == ("at most", None, None)
        assert published < row[key]["high"] < 1.3 * published
    assert row["single_ms"]["p99"]["bound"] == "at least" and 0 < row["single_ms"]["p90"]["low"] < 6.3
    (cost,) = row["costs"]
    assert cost["usd_per_million_texts"]["low"] == pytest.approx(0.526 / 3600 / row["highest_rate"]["high"] * 1e6)
    assert cost["usd_per_million_texts"]["bound"] == "at least" and cost["date"] and cost["source"]
    assert said["absent"][0]["hardware"] == "cpu"


def test_the_reasons_for_a_bound_are_named(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows ran BERT-large (1,024 wide, 24 layers) with 195 tokens on average; twice or half of it is close."""

    def because(length: str = "128", **sizes: int) -> list[str]:
        Path(config).write_text(json.dumps(BERT | sizes))
        (row,) = estimated(capsys, config, "--hardware", "t4", "--length", length)["rows"]
        first, *others = [reason.partition(":")[0] for reason in row["bounded_by"]]
        assert first == "engine"
        return others

    assert because() == because(hidden_size=512, num_hidden_layers=12) == []
    assert because(hidden_size=504) == ["width"]
    assert because(num_hidden_layers=11) == ["depth"]
    assert because(hidden_size=384, num_hidden_layers=6) == ["width", "depth"]
    assert because("10") == because("97") == because("391") == ["length"]
    assert because("98") == because("390") == because("squad") == []


def test_parts_are_compared_by_their_bounds_and_prices(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of an A100 against a T4, and the front end, which limits a small model on an A100."""
    options = [
        "--hardware",
        "a100-40gb-mig-3g.20gb,a100-40gb-sxm",
        "--against",
        "t4",
        "-p",
        "fp16",
        "--length",
        "squad",
    ]
    half, whole, t4 = estimated(capsys, config, *options)["rows"]
    for row, at_least, at_most in ((half, 3, 4), (whole, 7, 9)):  # in the rows: 8.1 to 8.4 for the whole
        against = row["against"]
        assert against["of_bounds"] == pytest.approx(
            row["offline_texts_per_s"]["high"] / t4["offline_texts_per_s"]["high"]
        )
        assert at_least < against["of_bounds"] < at_most
        assert against["hardware"] == "t4" and not against["behind_front_end"]
    assert half["against"]["whole_gpu_of_bounds"] == pytest.approx(2 * half["against"]["of_bounds"])
    assert [one["price_ratio"] for one in half["against"]["prices"]] == [pytest.approx(2.61, abs=0.01)]
    assert "against" not in t4
    Path(config).write_text(json.dumps(MINILM))
    row = estimated(capsys, config, *options)["rows"][1]
    assert row["limited_by"] == "front end" and row["against"]["behind_front_end"]
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(["estimate", "--config", config, *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "x if both reach their bounds behind this front end. aws: 5.22x the price" in said


@pytest.mark.parametrize(
    ("hardware", "length", "start"),
    [
        ("a100-40gb-sxm,h100-sxm", "20", "Both are limited by the front end, "),
        ("a100-40gb-sxm,h100-sxm,l4", "20", "All are limited by the front end, "),
        ("a100-40gb-sxm", "20", None),
        ("t4,l4", "512", None),
    ],
)
def test_equal_bounds_of_the_front_end_are_explained_first(
    config: str, capsys: pytest.CaptureFixture[str], hardware: str, length: str, start: str | None
) -> None:
    Path(config).write_text(json.dumps(MINILM))
    found = estimate.lines(estimated(capsys, config, "--hardware", hardware, "--length", length))
    if start is None:
        assert not any("no difference" in line for line in found)
    else:
        assert found[0] == f"{start}so this estimate shows no difference in throughput."


def test_no_part_is_estimated_beyond_the_front_end(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config).write_text(json.dumps(MINILM))
    for inputs in ("1", "32"):
        found = estimated(capsys, config, "--hardware", "a100-40gb-sxm", "--length", "20", "--inputs", inputs)
        (row,) = found["rows"]
        limit = found["front_end"]["texts_per_s"]
        assert row["offline_texts_per_s"]["high"] == pytest.approx(limit)
        assert row["limited_by"] == "front end"
        assert found["front_end"]["machine"] and found["front_end"]["source"].endswith("front-end.json")
        assert limit == pytest.approx(front_end.load().texts_per_s(int(inputs)))


def test_the_terminal_shows_a_bound_and_its_reasons(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    Path(config).write_text(json.dumps(MINILM))
    assert cli.run(["estimate", "--config", config, "--hardware", "t4", "--length", "20", "--against", "t4"]) == 0
    out = capsys.readouterr().out
    assert "at most" in out and "at least" in out and "≥" not in out
    for reason in ("- engine: the rows ran TensorRT", "- width: ", "- depth: ", "limited by the front end: t4 fp16"):
        assert reason in out


def test_the_table_fits_a_terminal_and_is_labeled(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["--hardware", "t4,a100-40gb-mig-3g.20gb", "--length", "128", "--rate", "50", "--against", "t4"]
    assert cli.run(["estimate", "--config", config, *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith("estimated, not measured")
    words = " ".join(out.split())
    assert "based on rows of a100-40gb-mig-1g.5gb and of a100-40gb-sxm, interpolated" in words
    assert "x if both reach their bounds" in words and "x for the whole GPU. aws: " in words
    assert "TensorRT" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_capacity_file_is_an_additional_row(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "capacity.json").write_text('{"fixed_s": 0.004, "tokens_per_s": 15000}')
    assert (
        cli.run(
            ["estimate", "--config", config, "--capacity", "capacity.json", "--length", "100", "--rate", "20", "--json"]
        )
        == 0
    )
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["basis"] == "pace"
    assert row["single_ms"]["p99"]["value"] == pytest.approx(1000 * front_end.load().seconds(1) + 4 + 100 / 15)


def test_a_capacity_file_has_parallel_batches_and_a_batch_limit(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def texts_per_s(**measured: int) -> float:
        (tmp_path / "capacity.json").write_text(json.dumps({"fixed_s": 0.004, "tokens_per_s": 15_000, **measured}))
        assert (
            cli.run(["estimate", "--config", config, "--capacity", "capacity.json", "--length", "100", "--json"]) == 0
        )
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        return float(row["offline_texts_per_s"]["value"])

    # A batch with one text of 100 tokens takes 4 + 100 / 15 ms. Two cores run two such batches.
    alone = texts_per_s(max_batch_tokens=100)
    assert alone == pytest.approx(1000 / (4 + 100 / 15), rel=1e-3)
    assert texts_per_s(max_batch_tokens=100, parallel_batches=2) == pytest.approx(2 * alone, rel=1e-3)
    assert texts_per_s() > 1.5 * alone


def test_an_invalid_capacity_file_is_an_error(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "capacity.json").write_text('{"fixed_s": 0.004, "tokens_per_s": 15000, "parallel_batches": 0}')
    assert cli.run(["estimate", "--config", config, "--capacity", "capacity.json", "--length", "100"]) == 2
    assert "`parallel_batches` must be a whole number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "t5"], "hardware 't5' not found"),
        (["--hardware", "t4", "--rate", "5", "--users", "5"], "exclude each other"),
        (["--hardware", "t4", "--length", "10", "--corpus", "mixed"], "both set the input lengths"),
        (["--hardware", "t4", "--length", "long"], "--length 'long'"),
        (["--hardware", "t4", "-p", "bf16"], "cannot estimate bf16 on t4"),
        (["--hardware", "cpu"], "a CPU profile has no peaks"),
    ],
)
def test_invalid_options_are_errors(
    config: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["estimate", "--config", config, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and not out


def test_a_model_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["estimate"]) == 2
    assert "--config FILE" in capsys.readouterr().err


def test_each_source_of_prices_and_the_word_over_are_explained_once(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--hardware", "t4,l4", "-p", "fp16", "--length", "128", "--rate", "400"]
    assert cli.run(["estimate", "--config", config, *arguments]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("over: the offered rate exceeds the capacity") == 1
    assert out.count("[1] ") == 3  # one source, named by the prices of both
    assert "t4: 0.526 USD/h, aws g4dn.xlarge [1]" in out
