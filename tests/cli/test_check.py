"""`inferctl check` and `inferctl catalog` as a person or a pipeline sees them: exit code, stdout, stderr."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl.cli import run
from inferctl.facts import catalog
from tests.models.decoder_configs import LLAMA_31_8B

Golden = Callable[[str, str], None]
Captured = pytest.CaptureFixture[str]

SPEC = """\
name: minilm
model: {source: model}
serve: {precision: bf16}
image: {base: cuda13.0}
hardware: [t4, a100-40gb-mig-1g.5gb, a100-40gb-mig-3g.20gb, l4]
slo: {p99_ms: 70}
"""


def model_folder(path: Path, rows: int, width: int = 384, config: dict[str, Any] | None = None) -> None:
    """A model folder whose weights file is a hole of the right size: only its header is ever read."""
    path.mkdir()
    config = config or {
        "architectures": ["BertModel"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "vocab_size": 30522,
    }
    (path / "config.json").write_text(json.dumps(config))
    size = rows * width * 2
    header = json.dumps({"w": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, size]}}).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    words = {"[UNK]": 0, "a": 1}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    (path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def add_pooling(folder: Path) -> None:
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    listed = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 8}')


def test_a_hint_is_complete_however_long_its_names_are(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / ("long" * 40)
    model_folder(folder, 1000)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    run(["check", "--model", str(folder)])
    shown = "".join(capsys.readouterr().out.split())
    assert f"inferctlconvert{folder}" in shown


def json_of(command: list[str], capsys: Captured) -> dict[str, Any]:
    assert run([*command, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec and a model of 22.7 million parameters, and the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inferctl.yaml").write_text(SPEC)
    model_folder(tmp_path / "model", rows=59_149)
    return tmp_path


def test_the_report_at_80_columns(here: Path, capsys: Captured, golden: Golden) -> None:
    code = run(["check"])
    told = capsys.readouterr()
    assert (code, told.err) == (0, "")
    assert max(map(len, told.out.splitlines())) <= 80
    golden("check-warnings.txt", told.out)


def test_the_task_follows_from_the_model_and_a_contradiction_ends_with_2(here: Path, capsys: Captured) -> None:
    assert json_of(["check"], capsys)["task"] == "embed"
    config = here / "model" / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps(data | {"architectures": ["BertForSequenceClassification"]}))
    found = json_of(["check"], capsys)
    assert (found["task"], found["model"]["labels"]) == ("classify", ["LABEL_0", "LABEL_1"])
    config.write_text(json.dumps(data | {"architectures": ["BertForSequenceClassification"], "num_labels": 1}))
    assert json_of(["check"], capsys)["task"] == "rerank"
    assert run(["check"]) == 0
    assert capsys.readouterr().out.startswith("minilm: rerank, bf16 on cuda13.0")
    (here / "inferctl.yaml").write_text(SPEC.replace("source: model", "source: model, task: embed"))
    assert run(["check"]) == 2
    assert "hint: set `model.task: auto`" in capsys.readouterr().out


@pytest.fixture
def llama(here: Path) -> Path:
    """A folder with the configuration and the size of Llama 3.1 8B, next to the spec."""
    config = LLAMA_31_8B | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    model_folder(here / "llama", rows=1_960_513, width=4096, config=config)
    (here / "inferctl.yaml").write_text(
        "name: llama\nmodel: {source: llama}\nserve: {max_context_tokens: 32768}\n"
        "hardware: [t4, a100-40gb-mig-3g.20gb, a100-40gb-sxm, cpu]\nimage: {base: vllm-cuda13.0}\n"
    )
    return here / "llama"


def on_a_base_for_embeddings(folder: Path) -> None:
    spec = folder / "inferctl.yaml"
    spec.write_text(spec.read_text().replace("vllm-cuda13.0", "cuda13.0"))


def test_a_generative_model_at_80_columns(llama: Path, capsys: Captured, golden: Golden) -> None:
    code = run(["check"])
    told = capsys.readouterr()
    assert (code, told.err) == (2, "")
    assert max(map(len, told.out.splitlines())) <= 80
    golden("check-generate.txt", told.out)
    assert run(["check", "--hardware", "all"]) == 2
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_document_of_a_generative_model_has_stable_keys(llama: Path, capsys: Captured) -> None:
    document = json_of(["check", "--hardware", "a100-40gb-sxm"], capsys)
    (part,) = document["hardware"]
    assert document["task"] == "generate"
    assert list(part["generation"]) == [
        *("estimated", "gpus", "kv_cache_bytes", "kv_bytes_per_token", "context_tokens", "longest_context_tokens"),
        *("sequences", "typical_sequences", "typical_tokens"),
    ]
    assert (part["generation"]["kv_bytes_per_token"], part["generation"]["context_tokens"]) == (131072, 32768)
    assert part["memory"]["weights_bytes"] == 2 * 1_960_513 * 4096
    assert "slo" not in {finding["topic"] for finding in document["findings"]}
    on_a_base_for_embeddings(llama.parent)
    assert json_of(["check", "--model", "model"], capsys)["hardware"][0]["generation"] is None


def test_an_embedding_model_with_a_generative_architecture_is_recognized(llama: Path, capsys: Captured) -> None:
    add_pooling(llama)
    on_a_base_for_embeddings(llama.parent)
    document = json_of(["check", "--hardware", "a100-40gb-sxm"], capsys)
    assert document["task"] == "embed"
    (found,) = [finding for finding in document["findings"] if finding["topic"] == "settings"]
    assert "serve.max_context_tokens" in found["what"]


def test_a_model_that_vllm_does_not_run_runs_on_no_hardware(llama: Path, capsys: Captured) -> None:
    config = llama / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MPTForCausalLM"))
    assert run(["check"]) == 2
    told = " ".join(capsys.readouterr().out.split())
    assert "cpu: vLLM does not run MPTForCausalLM" in told or "2 more: vLLM does not run MPTForCausalLM" in told
    assert "0 of 4 can run it" in told


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("--driver 525.147.05", 2, "the container toolkit rejects the image on driver 525"),
        ("--driver 535.129.03", 0, "container toolkit 1.17.5 or newer"),
        ("--hardware b200-sxm --driver 535", 2, "driver 535 is older than the GPU"),
        ("--hardware b200-sxm --driver 570", 0, ""),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_driver_that_is_too_old_ends_with_2(arguments: str, code: int, words: str, capsys: Captured) -> None:
    assert run(["check", *arguments.split()]) == code
    assert words in " ".join(capsys.readouterr().out.split())


def test_the_document_has_stable_keys(here: Path, capsys: Captured) -> None:
    document = json_of(["check"], capsys)
    assert list(document) == [
        *("ok", "verdict", "file", "name", "task", "precision", "base", "stack", "hardware", "findings", "problems"),
        "model",
    ]
    t4 = document["hardware"][0]
    assert "7.5" in t4["precision"].pop("reason")
    assert t4["precision"] == {"requested": "bf16", "effective": "bf16", "level": "emulated"}
    parts = {"weights_bytes": 45_426_432, "activations_bytes": 163_577_856, "overhead_bytes": 1_000_000_000}
    sums = {"estimated": True, "needs_bytes": sum(parts.values()), "has_bytes": 16_000_000_000}
    assert t4["memory"] == sums | parts
    assert set(document["findings"][0]) == {"level", "topic", "part", "what", "why", "hint"}
    assert document["stack"]["driver_floor"] == 580


def test_a_model_that_is_not_here_is_not_checked(here: Path, capsys: Captured) -> None:
    (here / "inferctl.yaml").write_text("\n".join(line for line in SPEC.splitlines() if "hardware" not in line))
    assert run(["check", "--model", "org/model", "--hardware", "t4"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(words in told for words in ("memory not checked", "memory was not checked", "not pinned"))
    assert "can run it" not in told
    assert run(["check"]) == 0
    assert "no hardware specified" in capsys.readouterr().out
    every = json_of(["check", "--hardware", "all"], capsys)["hardware"]
    assert [part["key"] for part in every] == list(catalog.hardware_profiles())


@pytest.mark.parametrize(
    ("file", "change", "found"),
    [
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncates at the start of a text"),
        ("config.json", {"model_type": "nonsense"}, "does not know the model type 'nonsense'"),
    ],
)
def test_a_folder_that_ends_the_start_is_an_error(
    here: Path, file: str, change: dict[str, str], found: str, capsys: Captured
) -> None:
    path = here / "model" / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    assert run(["check"]) == 2
    assert found in " ".join(capsys.readouterr().out.split())


def test_the_prompts_of_a_model_are_named_and_invalid_ones_end_with_2(here: Path, capsys: Captured) -> None:
    file = here / "model" / "config_sentence_transformers.json"
    add_pooling(here / "model")
    file.write_text(json.dumps({"prompts": {"query": "q: "}}))
    assert json_of(["check"], capsys)["model"]["prompts"] == {"names": ["query"], "default": None}
    file.write_text('{"default_prompt_name": "passage"}')
    assert run(["check"]) == 2
    assert "`default_prompt_name` is 'passage'" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("what", ["bases", "stacks", "hardware"])
def test_the_catalog_is_a_table_a_document_and_explained_entries(what: str, capsys: Captured) -> None:
    known = {"bases": catalog.bases(), "stacks": catalog.stacks(), "hardware": catalog.hardware_profiles()}[what]
    assert run(["catalog", what]) == 0
    told = capsys.readouterr()
    assert max(map(len, told.out.splitlines())) <= 80
    assert all(key in told.out for key in known)
    assert run(["catalog", what, "--json"]) == 0
    told = capsys.readouterr()
    entries = json.loads(told.out)
    assert [entry["key"] for entry in entries] == list(known)
    assert all(entry["sources"] or entry["notes"] for entry in entries)
    assert told.err == ""
    for key, entry in known.items():
        assert run(["catalog", what, key]) == 0
        explained = yaml.safe_load(capsys.readouterr().out)
        assert (explained["key"], len(explained["sources"])) == (key, len(entry.sources))


@pytest.mark.parametrize(
    ("rows", "part", "code", "level"), [((7, 7), "t4", 2, "error"), ((7, 6), "t4", 0, "warn"), ((7, 7), "l4", 0, "ok")]
)
def test_several_models_need_the_sum_of_their_memory(
    rows: tuple[int, int], part: str, code: int, level: str, here: Path, capsys: Captured
) -> None:
    """Rows of 384 16-bit numbers, in units of 1 GB. Each model fits alone."""
    models = []
    for number, gigabytes in enumerate(rows):
        model_folder(here / f"model{number}", gigabytes * 10**9 // (2 * 384))
        add_pooling(here / f"model{number}")
        models.append({"name": f"m{number}", "model": {"source": f"model{number}"}})
    spec = {"name": "mix", "hardware": [part], "models": models}
    (here / "inferctl.yaml").write_text(yaml.safe_dump(spec))
    assert run(["check", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert [model["hardware"][0]["verdict"] for model in found["models"]] == ["ok", "ok"]
    (memory,) = [each for each in found["findings"] if each["topic"] == "memory.all"]
    assert (memory["level"], memory["part"]) == (level, part)
    assert all(f"m{number} {gigabytes + 1}." in memory["why"] for number, gigabytes in enumerate(rows))
