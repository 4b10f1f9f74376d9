"""Tests the command `inferctl estimate`."""

from __future__ import annotations

import functools
import json
import math
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


Captured = pytest.CaptureFixture[str]


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


def estimated(capsys: Captured, config: str, *arguments: str) -> dict[str, Any]:
    assert cli.run(["estimate", "--config", config, *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


CLASSIFIER = "BertForSequenceClassification"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["HF_ColBERT"]}, ("a multi-vector model",)),
        ({"architectures": [CLASSIFIER], "num_labels": 1}, (f"is of a reranker ({CLASSIFIER})", "measure a reranker")),
        ({"architectures": [CLASSIFIER]}, (f"is of a classifier ({CLASSIFIER})", "measure a classifier")),
        (
            {"architectures": ["Qwen3ForCausalLM"]},
            ("is of a generative model (Qwen3ForCausalLM)", "an embedding model has a modules.json in its folder"),
        ),
    ],
)
def test_other_models_than_those_of_dense_vectors_are_not_estimated(
    config: str, changes: dict[str, Any], told: tuple[str, ...], capsys: Captured
) -> None:
    Path(config).write_text(json.dumps(MINILM | changes))
    assert cli.run(["estimate", "--config", config, "--hardware", "t4"]) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in told)
    if changes["architectures"] == ["Qwen3ForCausalLM"]:
        (Path(config).parent / "modules.json").write_text("[]")
        assert estimated(capsys, config, "--hardware", "t4")


def test_figures_are_labeled_estimated_and_are_bounds(config: str, capsys: Captured) -> None:
    arguments = ("--hardware", "t4,cpu", "-p", "int8", "--length", "squad", "--slo-p99-ms", "130")
    said = estimated(capsys, config, *arguments)
    assert said["schema"] == "inferctl.estimate/5"
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


def test_each_model_of_a_spec_has_a_table_or_the_reason(config: str, capsys: Captured) -> None:
    models = []
    for name, changes in {"dense": {}, "order": {"architectures": [CLASSIFIER], "num_labels": 1}}.items():
        (Path(name)).mkdir()
        Path(name, "config.json").write_text(json.dumps(MINILM | changes))
        models.append(f"{{name: {name}, model: {{source: ./{name}}}}}")
    alone = estimated(capsys, "dense/config.json", "--hardware", "t4", "--length", "128")
    Path("inferctl.yaml").write_text(f"name: all\nmodels: [{', '.join(models)}]\n")
    command = ["estimate", "--hardware", "t4", "--length", "128"]
    assert cli.run([*command, "--json"]) == 0
    dense, order = json.loads(capsys.readouterr().out)["models"]
    assert (dense["name"], dense["rows"]) == ("dense", alone["rows"])
    assert (order["name"], order["rows"]) == ("order", []) and "of a reranker" in order["absent"][0]["reason"]
    assert cli.run(command) == 0
    shown = capsys.readouterr().out
    assert 0 <= shown.index("dense") < shown.index("t4") < shown.index("order") < shown.index("not estimated:")


def test_the_reasons_for_a_bound_are_named(config: str, capsys: Captured) -> None:
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


BGE_BASE = BERT | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
T4, HALF = 0.526, 2.745 / 2  # USD per hour in the catalog: a T4, and half an A100 with 40 GB
CHOICE = ("--hardware", "t4,a100-40gb-mig-3g.20gb", "--texts", "10M", "--api-processes", "4")


@pytest.mark.parametrize(
    ("arguments", "hardware", "replicas", "usd"),
    [
        # 10 million texts at 500 per second take 20,000 s. A T4 serves 600 of 256 tokens, so one suffices.
        (["--rate", "500", "--length", "256"], "t4", 1, T4 * 20_000 / 3600),
        (["--rate", "500", "--length", "256", "--slo-p99-ms", "100"], "t4", 1, T4 * 20_000 / 3600),
        # It serves 300 of 512 tokens: two. Half an A100 serves 1,000, and costs 2.6 times as much as one T4.
        (["--rate", "500", "--length", "512"], "t4", 2, 2 * T4 * 20_000 / 3600),
        # At ten times the rate: nine T4s, or three halves of an A100, which serve 2,000 each.
        (["--rate", "5000", "--length", "256"], "a100-40gb-mig-3g.20gb", 3, 3 * HALF * 2_000 / 3600),
        # As many texts per second, four in each request.
        (["--rate", "1250", "--inputs", "4", "--length", "256"], "a100-40gb-mig-3g.20gb", 3, 3 * HALF * 2_000 / 3600),
        # A request of 256 tokens takes a T4 at least 2.1 ms, and half an A100 1.3 ms.
        (["--rate", "500", "--length", "256", "--slo-p99-ms", "2"], "a100-40gb-mig-3g.20gb", None, None),
    ],
)
def test_the_cheapest_hardware_has_the_replicas_and_the_cost_of_the_rate(
    config: str, arguments: list[str], hardware: str, replicas: int | None, usd: float | None, capsys: Captured
) -> None:
    Path(config).write_text(json.dumps(BGE_BASE))
    found = estimated(capsys, config, *CHOICE, *arguments)
    assert found["verdict"]["hardware"] == hardware and found["texts"] == 10_000_000
    row = next(row for row in found["rows"] if row["hardware"] == hardware)
    (cost,) = row["costs"]
    if replicas:
        assert row["replicas"]["low"] == replicas and cost["usd"]["low"] == pytest.approx(usd)
    assert cost["usd_per_hour_of_all"]["low"] == pytest.approx(row["replicas"]["low"] * cost["usd_per_hour"])
    for row in found["rows"]:
        highest = row["highest_rate" if "--slo-p99-ms" in arguments else "offline_texts_per_s"]["high"]
        highest /= 1 if "--slo-p99-ms" in arguments else found["tokens"]["inputs"]
        # Each replica gets its part of the rate. Without a rate within the SLO, no number of them suffices.
        assert (row["replicas"] is None) == (highest == 0) == (row["costs"] == [])
        if highest:
            assert row["replicas"]["low"] == math.ceil(float(arguments[1]) / highest)
            assert row["load"]["requests_per_s"]["value"] == pytest.approx(float(arguments[1]) / row["replicas"]["low"])


def test_without_a_rate_the_cost_is_that_of_full_load(config: str, capsys: Captured) -> None:
    for row in estimated(capsys, config, *CHOICE, "--length", "squad", "-p", "fp16")["rows"]:
        hours = 10e6 / row["offline_texts_per_s"]["high"] / 3600
        assert row["hours"]["low"] == pytest.approx(hours)
        assert row["costs"][0]["usd"]["low"] == pytest.approx(hours * row["costs"][0]["usd_per_hour"])


def test_the_next_hardware_and_the_needed_share_follow_from_the_costs(config: str, capsys: Captured) -> None:
    """T4s are cheaper than half an A100 while two suffice: 2 x 0.526 < 1.3725 < 3 x 0.526 USD per hour."""
    Path(config).write_text(json.dumps(BGE_BASE))
    found = estimated(capsys, config, *CHOICE, "--rate", "500", "--length", "256")
    decided, t4 = found["verdict"], found["rows"][0]
    assert decided["next"]["times"] == pytest.approx(HALF / T4)
    assert decided["replicas_at_most"] == 2
    assert decided["share_needed"] == pytest.approx(250 / t4["offline_texts_per_s"]["high"])
    assert decided["clear"] is True
    # At full load, each costs what it serves: half an A100 serves 3.3 T4s for the price of 2.6.
    found = estimated(capsys, config, *CHOICE, "--length", "256")
    t4, half = (row["costs"][0]["usd_per_hour"] / row["offline_texts_per_s"]["high"] for row in found["rows"])
    assert found["verdict"]["share_needed"] == pytest.approx(half / t4)
    assert 0.7 < half / t4 < 0.9 and found["verdict"]["clear"] is False


@pytest.mark.parametrize("load", [["--rate", "500"], ["--rate", "9000"], []])
def test_equal_costs_have_no_winner(config: str, load: list[str], capsys: Captured) -> None:
    found = estimated(capsys, config, "--length", "16", "--hardware", "l4", "-p", "fp16,bf16", *load)
    first, second = (row["costs"][0]["usd_per_million_texts"]["low"] for row in found["rows"])
    assert first == second and found["verdict"]["clear"] is False and found["verdict"]["next"]["times"] == 1
    said = " ".join(estimate.conclusion(found))
    assert said.startswith("No clear difference.") and " costs as much, by these bounds." in said


def test_int8_of_another_engine_does_not_win(config: str, capsys: Captured) -> None:
    found = estimated(capsys, config, "--hardware", "t4", "-p", "int8,fp16", "--length", "256", "--rate", "200")
    int8, fp16 = (row["costs"][0]["usd_per_hour_of_all"]["low"] for row in found["rows"])
    assert int8 < fp16 and found["verdict"]["precision"] == "fp16"
    assert "t4 in int8 is not compared" in estimate.conclusion(found)[-1]
    found = estimated(capsys, config, "--hardware", "t4,l4", "-p", "int8", "--length", "256")
    assert found["verdict"]["precision"] == found["verdict"]["next"]["precision"] == "int8"


def test_a_load_at_the_capacity_has_no_p99_and_says_why(config: str, capsys: Captured) -> None:
    arguments = ["--hardware", "l4,a10", "--length", "16", "--slo-p99-ms", "900"]
    limit = estimated(capsys, config, *arguments)["rows"][0]["highest_rate"]["high"]
    found = estimated(capsys, config, *arguments, "--rate", str(limit))
    assert found["rows"][0]["load"]["p99_ms"] is None
    assert "l4 in bf16: no p99, since one replica would work without a pause" in estimate.lines(found)
    assert estimate.conclusion(found)[1:] == ["a10 in bf16 is not compared: the catalog has no price."]


def test_the_conclusion_comes_first_and_asks_for_the_length(
    config: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    Path(config).write_text(json.dumps(BGE_BASE))
    question = ["estimate", "--config", config, *CHOICE, "--rate", "500", "--slo-p99-ms", "100"]
    assert cli.run(question) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 81
    head, _, below = out.partition("hardware")
    said = " ".join(head.split())
    assert "t4 in fp16, at least 1 replica, 0.53 USD per hour, 10M texts in 5.56 hours for 2.92 USD." in said
    assert "48 tokens per text are assumed: pass `--length`" in said
    assert out.count("at most") == 1 and below  # in the heading of the rate
    assert cli.run([*question, "--length", "48"]) == 0
    assert "assumed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hardware", "sizes", "said"),
    [
        ("a10", {}, "The catalog has no price of a10 in bf16."),
        ("t4", {"hidden_size": 8192, "num_hidden_layers": 80}, "None of this hardware can serve this."),
        ("t4", {}, "t4 in fp16, at least "),
    ],
)
def test_a_single_part_has_no_comparison(
    config: str, hardware: str, sizes: dict[str, int], said: str, capsys: Captured
) -> None:
    Path(config).write_text(json.dumps(BGE_BASE | sizes))
    found = estimate.conclusion(estimated(capsys, config, "--hardware", hardware, "--length", "64"))
    assert len(found) == 1 and found[0].startswith(said)


def test_no_part_is_estimated_beyond_the_front_end(config: str, capsys: Captured) -> None:
    Path(config).write_text(json.dumps(MINILM))
    for inputs in ("1", "32"):
        found = estimated(capsys, config, "--hardware", "a100-40gb-sxm", "--length", "20", "--inputs", inputs)
        (row,) = found["rows"]
        limit = found["front_end"]["texts_per_s"]
        assert row["offline_texts_per_s"]["high"] == pytest.approx(limit)
        assert row["limited_by"] == "front end"
        assert found["front_end"]["machine"] and found["front_end"]["source"].endswith("front-end.json")
        assert limit == pytest.approx(front_end.load().texts_per_s(int(inputs)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "t5"], "hardware 't5' not found"),
        (["--hardware", "t4", "--length", "10", "--corpus", "mixed"], "both set the input lengths"),
        (["--hardware", "t4", "--length", "long"], "--length 'long'"),
        (["--hardware", "t4", "-p", "bf16"], "cannot estimate bf16 on t4"),
        (["--hardware", "t4", "-p", "int4"], "--precision cannot be 'int4'"),
        (["--hardware", "cpu"], "a CPU profile has no peaks"),
        (["--hardware", "t4", "--texts", "ten"], "--texts 'ten'"),
        (["--hardware", "t4", "--texts", "0"], "--texts '0'"),
    ],
)
def test_invalid_options_are_errors(config: str, arguments: list[str], message: str, capsys: Captured) -> None:
    assert cli.run(["estimate", "--config", config, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and not out
