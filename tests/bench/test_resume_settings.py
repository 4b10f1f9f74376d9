"""A bench goes on however it was called: the folder that it left leads to the same bench again."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from inferctl.cli import bench_setup
from inferctl.cli.bench_options import BenchOptions
from inferctl.core.errors import UsageError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands are given in, with a small model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["BertModel"]}')
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_bench_goes_on_whatever_named_its_model_and_plan(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "elsewhere").mkdir()
    for model in ("model", "./model/../model", str(here / "model")):
        for plan in ("quick", None):
            given = BenchOptions(model=model, plan=plan, output=here / "bench-results")
            begun = bench_setup.prepare_new(given)
            monkeypatch.chdir(here / "elsewhere")
            again = bench_setup.prepare_resumed(begun.bench.output)
            monkeypatch.chdir(here)
            assert again.bench.plan == begun.bench.plan
            assert again.bench.model == begun.bench.model == here / "model"
            assert again.context.slo_p99_ms is begun.context.slo_p99_ms is None


def test_a_bench_goes_on_with_a_spec_that_names_another_plan(here: Path) -> None:
    spec = here / "inferctl.yaml"
    spec.write_text("name: m\nmodel: {source: model}\nslo: {p99_ms: 50}\nbench: {plan: precision}\n")
    begun = bench_setup.prepare_new(BenchOptions(plan="quick"))
    assert bench_setup.prepare_resumed(begun.bench.output).bench.plan.name == "quick"
    spec.write_text(spec.read_text().replace("50", "60"))
    with pytest.raises(UsageError, match="the settings changed"):
        bench_setup.prepare_resumed(begun.bench.output)


LOADS: dict[str, dict[str, Any]] = {
    "steps": {"stages": [{"duration_s": 3, "rate": 5}, {"duration_s": 4, "rate": 9}]},
    "recorded": {"trace": "recorded.jsonl"},
}


@pytest.mark.parametrize("name", list(LOADS))
def test_loads_that_say_by_themselves_how_long_they_last_go_on(here: Path, name: str) -> None:
    (here / "recorded.jsonl").write_text('{"at_s": 0, "input": "a"}\n{"at_s": 6.5, "input": "b"}\n')
    matrix = {"precision": ["fp32"], "load": {"steady": {"rate": 50}, name: LOADS[name]}}
    (here / "mine.yaml").write_text(json.dumps({"name": "mine", "matrix": matrix}))
    begun = bench_setup.prepare_new(BenchOptions(model="model", plan="mine.yaml")).bench
    again = bench_setup.prepare_resumed(begun.output).bench
    for one, other in zip(begun.targets, again.targets, strict=True):
        assert begun.load_of(one) == again.load_of(other)
    assert again.load_of(again.targets[1]).duration_s == 7


@pytest.mark.parametrize("where", ["plan", "configuration"])
def test_a_trace_that_changed_is_named_and_refused(here: Path, where: str) -> None:
    trace = here / "recorded.jsonl"
    trace.write_text('{"at_s": 0, "input": "a"}\n{"at_s": 6.5, "input": "b"}\n')
    plan: dict[str, Any] = {"name": "mine", "configurations": [{"name": "fp32", "precision": "fp32"}]}
    (plan if where == "plan" else plan["configurations"][0])["load"] = LOADS["recorded"]
    (here / "mine.yaml").write_text(json.dumps(plan))
    place = bench_setup.prepare_new(BenchOptions(model="model", plan="mine.yaml")).bench.output
    bench_setup.prepare_resumed(place)
    trace.write_text(trace.read_text().replace('"b"', '"c"'))
    with pytest.raises(UsageError, match=r"a trace changed \(recorded\.jsonl: "):
        bench_setup.prepare_resumed(place)
    trace.unlink()
    with pytest.raises(UsageError, match=r"the trace recorded\.jsonl cannot be read"):
        bench_setup.prepare_resumed(place)
