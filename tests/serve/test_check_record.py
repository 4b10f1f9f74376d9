"""Tests the record of the checks at the start: when a start uses it, and that it never hides wrong results."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.config.spec import Task
from inferctl.core import assets
from inferctl.core.errors import UsageError
from inferctl.serve.engine_process.engine_protocol import EngineConfig, EngineInfo
from inferctl.serve.engines import check_record
from tests.serve import tiny_models

# The phases of a start: what is new of the model, of the hardware, or nothing.
ALL = ["computing the check texts in fp32", "loading the weights in fp32", "comparing with fp32", "warming up"]
COMPARED, NOTHING = ALL[1:], ALL[3:]


@pytest.fixture(scope="module")
def model(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make(minilm, tmp_path_factory.mktemp("bert"), "bert", "mean_tokens")


def start(config: EngineConfig) -> tuple[list[str], EngineInfo]:
    """Return the phases of a start of an engine in this process, and its properties."""
    from inferctl.serve.engines.encoder import EncoderEngine

    phases: list[str] = []
    info = EncoderEngine(config).load(phases.append)
    return phases, info


def config(folder: Path, file: Path, **settings: Any) -> EngineConfig:
    options = {"precision": "fp32", "device": "cpu", "max_batch_tokens": 64, "model_sha256": "a", **settings}
    return EngineConfig(model=str(folder), check_record=str(file), **options)


@pytest.fixture(scope="module")
def record(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a record of `model`."""
    file = tmp_path_factory.mktemp("record") / "record.json"
    start(config(model, file))
    return file.read_text()


@pytest.mark.parametrize(
    ("settings", "phases"),
    [
        ({}, NOTHING),
        ({"log": "json"}, NOTHING),
        ({"max_batch_tokens": 128}, COMPARED),
        ({"allow_inaccurate": True}, COMPARED),
        ({"engines": 2}, COMPARED),
        ({"model_sha256": "b"}, ALL),
        ({"max_input_tokens": 32}, ALL),
    ],
)
def test_a_start_repeats_what_the_record_does_not_have(
    settings: dict[str, Any], phases: list[str], record: str, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "record.json"
    file.write_text(record)
    found, info = start(config(model, file, **settings))
    assert found == phases and info.within_limit
    assert start(config(model, file, **settings))[0] == NOTHING, "the second of these starts has a record"


@pytest.mark.parametrize("changed", ["code", "instructions", "variable"])
def test_another_code_or_hardware_is_checked(
    changed: str, record: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "record.json"
    file.write_text(record)
    if changed == "code":
        monkeypatch.setattr(assets, "code_digest", lambda: "other")
    elif changed == "variable":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    else:
        monkeypatch.setattr(check_record, "hardware", lambda *_: "other")
    assert start(config(model, file))[0] == (ALL if changed == "code" else COMPARED)


NO_RECORDS: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "no JSON": lambda _: "{",
    "no object": lambda _: "[]",
    "deep": lambda _: "[" * 100_000,
    "other object": lambda _: '{"seal": "x"}',
    "cut": lambda text: text[:-100],
    "not sealed": lambda text: text.replace('"count"', '"Count"'),
}


@pytest.mark.parametrize("kind", [*NO_RECORDS, "folder", "missing"])
def test_a_file_without_a_record_is_ignored(kind: str, record: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    if kind == "folder":
        file.mkdir()
    elif kind != "missing":
        file.write_text(NO_RECORDS[kind](record))
    found = check_record.read(config(model, file))
    assert found.expected is None and not found.engines


def test_a_start_that_cannot_write_a_record_is_a_start(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    phases, info = start(config(model, tmp_path / "missing" / "record.json"))
    assert phases == ALL and info.within_limit
    assert [entry.levelname for entry in caplog.records if "record.json" in entry.getMessage()] == ["WARNING"]


def test_results_that_differ_from_those_of_the_record_end_the_start(record: str, model: Path, tmp_path: Path) -> None:
    """On other hardware, the results of a start are compared with those of the record."""
    file = tmp_path / "record.json"
    document = json.loads(record)
    del document["seal"]
    document["engines"].clear()
    values = np.frombuffer(base64.b64decode(document["expected"]["values"]), np.float32)[::-1]
    document["expected"]["values"] = base64.b64encode(values.tobytes()).decode()
    file.write_text(json.dumps({**document, "seal": check_record._sha256(document)}))
    with pytest.raises(UsageError, match="cosine to fp32"):
        start(config(model, file))


@pytest.mark.parametrize("task", ["rerank", "sparse"])
def test_the_rows_of_other_tasks_are_kept(task: Task, splade: Path, tmp_path: Path) -> None:
    """Rows of sparse weights have several widths, those of scores one."""
    folder = splade if task == "sparse" else tiny_models.make_cross_encoder(tmp_path / "model", "bert")
    made = config(folder, tmp_path / "record.json", task="embed" if task == "sparse" else task)
    assert start(made)[0] == ALL
    phases, info = start(replace(made, max_batch_tokens=128))
    assert phases == COMPARED and info.within_limit
    assert (info.cosine_min or 1 - (info.logit_error or 0.0)) > 0.9999
