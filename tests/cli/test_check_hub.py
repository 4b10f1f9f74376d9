"""`inferctl check` of a hub model whose weights are not on this machine: how it is served, or why it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub import online, serving
from tests.processes import several
from tests.published_models import write

E5 = "intfloat/multilingual-e5-large-instruct"
PROMPTS = {"prompts": {"query": "Q: ", "passage": "P: "}, "default_prompt_name": None}


def added(name: str, value: Any) -> Callable[[Path], object]:
    """Add keys to a JSON file of the model, or write it."""

    def change(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        data = json.loads(file.read_text()) if file.exists() and isinstance(value, dict) else {}
        file.write_text(json.dumps(data | value if isinstance(value, dict) else value))

    return change


def shell(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(2, {"path": "2_Shell", "type": "sentence_transformers.models.Shell"})
    (folder / "modules.json").write_text(json.dumps(modules))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "tf_model.h5").write_bytes(b"x")


# Name of a repository -> the published model that it resembles, a change, and what `model` or a finding has.
CASES: dict[str, tuple[str, Callable[[Path], object], dict[str, Any] | str]] = {
    "org/plain": (
        E5,
        lambda _: None,
        {"pooling": "mean", "normalize": True, "max_tokens": 128, "direction": None, "own_code": []},
    ),
    "org/cls": ("BAAI/bge-base-en-v1.5", lambda _: None, {"pooling": "cls", "max_tokens": 128}),
    "org/prompts": (
        E5,
        added("config_sentence_transformers.json", PROMPTS),
        {"prompts": {"names": ["query", "passage"], "default": None}},
    ),
    "org/eos": (
        E5,
        added("tokenizer_config.json", {"add_eos_token": True}),
        {"add_eos_token": None},
    ),  # only the last token matters
    "org/both-ways": (E5, added("config.json", {"is_causal": False}), {"direction": "bidirectional"}),
    "org/shorter": (E5, added("sentence_bert_config.json", {"max_seq_length": 64}), {"max_tokens": 64}),
    "org/own-code": (E5, added("config.json", {"auto_map": {"AutoModel": "m.M"}}), "code of its own"),
    "org/pickled": ("BAAI/bge-m3", lambda _: None, {"pooling": "cls"}),
    "org/rerank": (
        "cross-encoder/ms-marco-MiniLM-L6-v2",
        lambda _: None,
        {"activation": "Identity", "max_tokens": 128},
    ),
    "org/generate": ("Qwen/Qwen2.5-1.5B-Instruct", lambda _: None, {"own_code": []}),
    "org/static": (
        "sentence-transformers/static-retrieval-mrl-en-v1",
        lambda _: None,
        {"static": True, "pooling": "mean", "normalize": False, "max_tokens": 32_768, "own_code": []},
    ),
    "org/model2vec": ("minishlab/potion-base-8M", lambda _: None, {"static": True, "normalize": True}),
    "org/unknown-module": (E5, shell, "Shell"),
    "org/no-weights": (E5, without_weights, "no weights"),
    "org/two-labels": (
        "cross-encoder/ms-marco-MiniLM-L6-v2",
        added("config.json", {"id2label": {"0": "a", "1": "b"}}),
        {"labels": ["a", "b"], "activation": "softmax"},
    ),
    "org/strange": (
        E5,
        added("config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": [1]}),
        "default_prompt_name",
    ),
    "org/escape": (
        E5,
        added("modules.json", [{"path": "../x", "type": "sentence_transformers.models.Pooling"}]),
        "outside",
    ),
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and stdout of `inferctl check --json` by repository, and for two of them of the report (`NAME text`)."""
    root = tmp_path_factory.mktemp("hub")
    folders: dict[str, Any] = {}
    for name, (published, change, _) in CASES.items():
        folders[name] = write(published, root / name.replace("/", "-"))
        change(folders[name])
    commands = {name: ["check", "--model", name, "--json"] for name in CASES}
    for name in ("org/prompts", "org/unknown-module"):
        commands[f"{name} text"] = ["check", "--model", name, "--hardware", "t4"]
    with serving(folders) as hub:
        done = several(list(commands.values()), cwd=root, env=online(hub, root / "home"))
    assert [each.stderr for each in done] == [""] * len(done)
    weights = [file for file in hub.downloads() if file.endswith((".safetensors", ".bin", "tokenizer.json"))]
    assert weights == [], "no weights and no vocabulary are downloaded"
    return {name: (each.returncode, each.stdout) for name, each in zip(commands, done, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_check_says_how_a_hub_model_is_served_or_why_not(name: str, checked: dict[str, tuple[int, str]]) -> None:
    expected = CASES[name][2]
    code, out = checked[name]
    document = json.loads(out)
    # The default base image has no vLLM.
    errors = [each for each in document["findings"] if each["level"] == "error" and each["topic"] != "base.task"]
    if isinstance(expected, str):
        assert (code, document["model"]) == (2, None)
        assert any(expected in finding["what"] and finding["hint"] for finding in errors), errors
        return
    assert errors == []
    assert code == 0 or document["task"] == "generate"
    assert {key: document["model"][key] for key in expected} == expected
    warned = {finding["topic"] for finding in document["findings"] if finding["level"] == "warn"}
    assert ("weights" in warned) == (name == "org/pickled")


def test_the_report_has_a_line_about_the_model(checked: dict[str, tuple[int, str]]) -> None:
    code, out = checked["org/prompts text"]
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("model: ")]
    assert all(word in line for word in ("mean pooling", "normalized", "128 tokens", "query, passage"))
    code, out = checked["org/unknown-module text"]
    assert (code, "model: " in out) == (2, False)
