"""Tests the estimated rows of a benchmark: labeled, with ranges, and not in measured columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inferctl import estimate
from inferctl.bench.measure.outcome import BenchTarget
from inferctl.bench.plan.plan import Plan
from inferctl.bench.plan.sections import Configuration
from inferctl.bench.plan.shape import Load
from inferctl.bench.report import caveats, estimated, findings
from inferctl.bench.report.estimated import EstimatedFigures
from inferctl.bench.report.rows import MeasuredRow
from inferctl.core.errors import UsageError

MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
}
LENGTHS = [20 + i % 100 for i in range(300)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MINILM))
    return tmp_path


def load(**values: Any) -> Load:
    return Load.model_validate(values)


def test_an_estimate_is_labeled_bounded_and_equal_each_time(model: Path) -> None:
    one, other = (estimate.rows(model, "fp16", "t4", load(mode="open", rate=2000), LENGTHS) for _ in range(2))
    assert one == other
    assert one.outcome == "estimated"
    assert one.p99_ms and one.p50_ms and one.p99_ms.low and one.p50_ms.low
    assert (one.p99_ms.value, one.p99_ms.high, one.p99_ms.bound) == (None, None, "at least")
    assert one.p50_ms.low < one.p99_ms.low
    assert one.requests_per_s.value == 2000
    for expected in ("TensorRT", "BERT-large"):
        assert any(expected in reason for reason in one.bounded_by)
    json.dumps(one.as_dict())


def test_a_rate_above_the_capacity_has_no_latency(model: Path) -> None:
    found = estimate.rows(model, "fp16", "t4", load(mode="open", rate=90_000), LENGTHS)
    assert found.saturated
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == (None, None, None)
    assert found.requests_per_s.bound == "at most"
    assert found.requests_per_s.high and found.requests_per_s.high < 90_000


def test_a_closed_loop_gives_throughput_and_latency(model: Path) -> None:
    found = estimate.rows(model, "auto", "a100-40gb-sxm", load(users=8), LENGTHS)
    assert found.precision == "bf16"
    assert any("bf16: no row ran it" in note for note in found.notes)
    assert found.p50_ms and found.p50_ms.low
    assert found.requests_per_s.high == pytest.approx(8000 / found.p50_ms.low, rel=0.25)


def test_llm_int8_is_not_estimated_from_tensorrt_rows(model: Path) -> None:
    with pytest.raises(UsageError, match=r"LLM\.int8"):
        estimate.rows(model, "int8", "t4", load(), LENGTHS)


def test_a_model_that_does_not_fit_is_the_first_note(model: Path) -> None:
    large = MINILM | {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
    }
    (model / "config.json").write_text(json.dumps(large))
    found = estimate.rows(model, "fp16", "t4", load(), LENGTHS)
    assert found.notes[0].startswith("does not fit")


def plan(**values: Any) -> Plan:
    names = ("fp16", "int8")
    return Plan(
        name="x",
        configurations=[Configuration.model_validate({"name": name, "precision": name}) for name in names],
        load=Load.model_validate(values),
        corpus="short",
    )


def test_a_bench_gets_figures_or_a_reason_for_each_configuration(model: Path) -> None:
    subjects = [BenchTarget("fp16", "fp16"), BenchTarget("int8", "int8"), BenchTarget("far", url="http://example.com")]
    found = {subject.name: figures for subject, figures in estimated.each(plan(), subjects, model, "t4")}
    fp16 = found["fp16"]
    assert isinstance(fp16, EstimatedFigures)
    assert fp16.value("p99_ms") is None and fp16.value("requests_per_s") is None
    p99 = fp16.ranges["p99_ms"]
    assert p99 and (p99.low or 0) > 0 and p99.bound == "at least"
    assert any("only a bound" in note for note in fp16.notes)
    assert "LLM.int8" in str(found["int8"])
    assert found["far"] == "inferctl did not start this server"


def test_loads_of_several_stages_are_not_estimated(model: Path) -> None:
    stages = plan(mode="open", stages=[{"duration_s": 5, "rate": 10}, {"duration_s": 5, "rate": 20}])
    assert [figures for _, figures in estimated.each(stages, [BenchTarget("fp16", "fp16")], model, "t4")] == [
        "only loads of one stage are estimated"
    ]


def test_rows_of_a_bench_keep_estimates_out_of_measured_columns(model: Path, tmp_path: Path) -> None:
    from inferctl.bench.measure import environment
    from inferctl.bench.report import result

    subjects = [BenchTarget("fp16", "fp16"), BenchTarget("int8", "int8")]
    context = result.ReceiptContext(plan(), environment.detect(), None, ["t4", "cpu"], None, tmp_path, subjects, model)
    measured = MeasuredRow("a", "measured", hardware={"key": "cpu", "name": "a CPU"})
    rows = result.other_hardware(context, [measured])
    assert [(row.configuration, row.outcome) for row in rows] == [
        ("fp16", "estimated"),
        ("t4: int8", "not measured here"),
    ]
    assert not {"p50_ms", "p99_ms", "requests_per_s", "n"} & rows[0].as_dict().keys()
    assert (rows[0].hardware or {})["key"] == "t4" and not rows[0].valid
    assert "estimated from 4 rows of t4 in fp16" in (rows[0].reason or "")
    said = [caveat.text for caveat in caveats.caveats(rows) if caveat.kind == "estimated"]
    assert any(text.startswith("fp16 on t4: ") for text in said)
    assert findings.describe(rows, "closed", 0.1)[0].startswith("No valid measurement")
