"""Tests the record of the checks at the start: when a start uses it, and that it never hides wrong results."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.config.spec import Task
from inferctl.core import assets
from inferctl.core.errors import UsageError
from inferctl.serve.engine_process.engine_protocol import EngineConfig, EngineInfo, pack_rows
from inferctl.serve.engines import check_record, checks
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


@pytest.mark.parametrize("changed", ["code", "library", "instructions", "variable"])
def test_another_code_or_hardware_is_checked(
    changed: str, record: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "record.json"
    file.write_text(record)
    if changed == "code":
        monkeypatch.setattr(assets, "code_digest", lambda: "other")
    elif changed == "library":
        monkeypatch.setattr(metadata, "version", lambda name: f"other {name}")
    elif changed == "variable":
        monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    else:
        monkeypatch.setattr(check_record, "hardware", lambda *_: "other")
    assert start(config(model, file))[0] == (ALL if changed in ("code", "library") else COMPARED)


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


def forge(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record and seal it, as a damaged or hostile program could."""
    document = json.loads(file.read_text())
    del document["seal"]
    change(document)
    file.write_text(json.dumps({**document, "seal": check_record._sha256(document)}))


def rows(change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Callable[[dict[str, Any]], object]:
    """Return a change of the fp32 results. What engines found is removed."""

    def replace_rows(document: dict[str, Any]) -> None:
        document["engines"].clear()
        found = document["expected"]
        values = np.frombuffer(base64.b64decode(found["values"]), np.float32).reshape(found["count"], found["width"])
        count, width, body = pack_rows(change(values))
        document["expected"] = {"count": count, "width": width, "values": base64.b64encode(body).decode()}

    return replace_rows


def engine(**fields: Any) -> Callable[[dict[str, Any]], object]:
    """Return a change of what the engines found."""
    return lambda document: [info.update(fields) for info in document["engines"].values()]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(rows(lambda found: found[::-1]), id="other rows"),
        pytest.param(rows(lambda found: found[1:]), id="a row less"),
        pytest.param(rows(lambda found: found[:, 1:]), id="narrow rows"),
        pytest.param(rows(lambda found: found * np.float32("nan")), id="NaN"),
        pytest.param(lambda document: document["expected"].update(count=2**70), id="huge count"),
        pytest.param(lambda document: document.update(engines=[1]), id="engines in a list"),
        pytest.param(lambda document: document["engines"].update(dict.fromkeys(document["engines"], 5)), id="number"),
        pytest.param(engine(batch_tokens="many"), id="text in place of a number"),
    ],
)
def test_a_start_ignores_a_wrong_record_and_writes_a_right_one(
    change: Callable[[dict[str, Any]], object], record: str, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "record.json"
    file.write_text(record)
    forge(file, change)
    phases, info = start(config(model, file))
    assert phases[-4:] == ALL and info.within_limit
    assert start(config(model, file))[0] == NOTHING


def test_results_that_differ_from_fp32_end_a_start_with_a_record(
    record: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "record.json"
    file.write_text(record)
    forge(file, lambda document: document["engines"].clear())
    monkeypatch.setitem(checks._MAX_COSINE_DISTANCE, "fp32", -1.0)
    with pytest.raises(UsageError, match="cosine to fp32"):
        start(config(model, file))


@pytest.mark.parametrize("kind", ["pipe", "other file", "other json", "large", "long name"])
def test_a_file_that_is_no_record_is_never_replaced(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ("n" * 300 if kind == "long name" else "file")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind != "long name":
        file.write_text({"other file": "name: mine\n", "other json": '{"keys": []}', "large": "x" * 5000}[kind])
    monkeypatch.setattr(check_record, "_MAX_BYTES", 4000)
    before = file.read_text() if kind not in ("pipe", "long name") else ""
    phases, info = start(config(model, file))
    assert phases == ALL and info.within_limit
    if kind == "pipe":
        assert file.is_fifo()
    elif kind != "long name":
        assert file.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ([] if kind == "long name" else ["file"])


@pytest.mark.parametrize("task", ["rerank", "sparse"])
def test_the_rows_of_other_tasks_are_kept(task: Task, splade: Path, tmp_path: Path) -> None:
    """Rows of sparse weights have several widths, those of scores one."""
    folder = splade if task == "sparse" else tiny_models.make_cross_encoder(tmp_path / "model", "bert")
    made = config(folder, tmp_path / "record.json", task="embed" if task == "sparse" else task)
    assert start(made)[0] == ALL
    phases, info = start(replace(made, max_batch_tokens=128))
    assert phases == COMPARED and info.within_limit
    assert (info.cosine_min or 1 - (info.logit_error or 0.0)) > 0.9999
