"""`inferctl estimate` as people and CI use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inferctl import cli

BERT = {
    "model_type": "bert",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    return "config.json"


def test_figures_are_called_estimated_and_have_ranges(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.run(["estimate", "--config", config, "--hardware", "t4,cpu", "-p", "int8", "--length", "squad", "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    (row,) = said["rows"]
    assert said["estimated"] is True and row["outcome"] == "estimated"
    assert row["offline_texts_per_s"]["value"] == pytest.approx(440, rel=0.10)  # MLPerf v0.7: 437 to 445
    assert row["offline_texts_per_s"]["low"] < row["offline_texts_per_s"]["value"] < row["offline_texts_per_s"]["high"]
    assert row["costs"][0]["usd_per_million_texts"]["value"] == pytest.approx(0.526 / 3600 / 440 * 1e6, rel=0.1)
    assert row["costs"][0]["date"] and row["costs"][0]["source"]
    assert said["absent"][0]["hardware"] == "cpu"


def test_the_table_fits_a_terminal_and_says_what_it_is(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["--hardware", "t4,a100-40gb-mig-3g.20gb", "--length", "128", "--rate", "50", "--against", "t4"]
    assert cli.run(["estimate", "--config", config, *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith("estimated, not measured")
    assert "between rows of a100-40gb-mig-1g.5gb and of a100-40gb-sxm" in out.replace("\n", " ").replace("  ", " ")
    assert "TensorRT" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_measured_pace_is_a_row_of_its_own(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "capacity.json").write_text('{"fixed_s": 0.004, "tokens_per_s": 15000}')
    assert (
        cli.run(
            ["estimate", "--config", config, "--capacity", "capacity.json", "--length", "100", "--rate", "20", "--json"]
        )
        == 0
    )
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["basis"] == "pace"
    assert row["single_ms"]["p99"]["value"] == pytest.approx(4 + 100 / 15)


def test_a_measured_pace_is_that_of_each_of_the_batches_at_a_time_within_the_limit_it_was_measured_with(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def texts_per_s(**measured: int) -> float:
        (tmp_path / "capacity.json").write_text(json.dumps({"fixed_s": 0.004, "tokens_per_s": 15_000, **measured}))
        assert (
            cli.run(["estimate", "--config", config, "--capacity", "capacity.json", "--length", "100", "--json"]) == 0
        )
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        return float(row["offline_texts_per_s"]["value"])

    # A batch of one text of 100 tokens takes 4 + 100 / 15 ms; two cores run two such batches.
    alone = texts_per_s(max_batch_tokens=100)
    assert alone == pytest.approx(1000 / (4 + 100 / 15))
    assert texts_per_s(max_batch_tokens=100, parallel_batches=2) == pytest.approx(2 * alone, rel=1e-3)
    assert texts_per_s() > 1.5 * alone


def test_a_capacity_that_makes_no_sense_is_named(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "capacity.json").write_text('{"fixed_s": 0.004, "tokens_per_s": 15000, "parallel_batches": 0}')
    assert cli.run(["estimate", "--config", config, "--capacity", "capacity.json", "--length", "100"]) == 2
    assert "parallel_batches must be a whole number above zero" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "t5"], "there is no hardware 't5'"),
        (["--hardware", "t4", "--rate", "5", "--users", "5"], "two kinds of load"),
        (["--hardware", "t4", "--length", "10", "--corpus", "mixed"], "both say how long"),
        (["--hardware", "t4", "--length", "long"], "--length 'long'"),
        (["--hardware", "t4", "-p", "bf16"], "bf16 on t4 cannot be estimated"),
    ],
)
def test_mistakes_are_named(
    config: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["estimate", "--config", config, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_must_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["estimate"]) == 2
    assert "--config FILE" in capsys.readouterr().err
