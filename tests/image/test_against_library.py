"""`inferctl verify --against sentence-transformers`: servers with another model than the right one are found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from inferctl.bench.load.target import ServerConnection, connect
from inferctl.core.errors import InferctlError
from inferctl.image import library, verify
from inferctl.image.output_checks import QUERY
from inferctl.image.records import ContainerState, DockerInfo, ImageInfo
from inferctl.models import reference_process
from inferctl.models.model import IMAGE_FOLDER
from inferctl.models.output_vectors import decode
from inferctl.models.reference_process import LIBRARIES
from inferctl.reading import task_config
from inferctl.serve.reference import reference
from tests import tiny_models
from tests.image import tiny
from tests.processes import ServerProcess, inferctl
from tests.reading import saved_models
from tests.reading.test_saved_models import LAST, MEAN, Change, changed, edit, modules_changed, tokenizer_json

FP32 = ("--precision", "fp32")


def noise(share: float) -> Change:
    """Return a change of one matrix of a layer: as much noise as a share of its numbers."""

    def change(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        file = folder / "model.safetensors"
        weights = load_file(file)
        name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
        torch.manual_seed(1)
        weights[name] += share * weights[name].std() * torch.randn_like(weights[name])
        save_file(weights, file, metadata={"format": "pt"})

    return change


def without_mask(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in tokens if each["content"] != "[MASK]"]


# What is wrong with the folder that a server has: its task, a change of the right folder, precision, part of the error.
FAULTS: dict[str, tuple[str, Change, str, str]] = {
    "noise in a layer": ("embed", noise(1e-3), "fp32", "12 of 12 texts"),
    "another pooling": ("embed", changed("1_Pooling/config.json", {"pooling_mode": "cls"}), "fp32", "of 12 texts"),
    "case is kept": (
        "embed",
        tokenizer_json("normalizer", "lowercase", value=False, settings={}),
        "fp32",
        "of 12 texts",
    ),
    "a special token is text": (
        "embed",
        tokenizer_json("added_tokens", value=without_mask, settings={}),
        "fp32",
        "1 of 12 texts.*'the end",
    ),
    "not normalized": ("embed", modules_changed(list.pop), "bf16", "12 of 12 texts"),
    "fewer dimensions": (
        "embed",
        changed("config_sentence_transformers.json", {"truncate_dim": 8}),
        "fp32",
        "the vectors have 8 numbers",
    ),
    "noise in a cross-encoder": ("rerank", noise(0.01), "fp32", "of 12 texts"),
    "noise in a classifier": ("classify", noise(0.01), "fp32", "of 12 texts"),
}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`right("rerank")` returns a small model for the task."""

    @cache
    def make(task: str) -> Path:
        folder = tmp_path_factory.mktemp(task)
        if task == "rerank":
            return tiny_models.make_cross_encoder(folder, "bert")
        if task == "classify":
            return tiny_models.make_cross_encoder(folder, "bert", num_labels=3)
        return saved_models.save(folder, "bert", MEAN, {})

    return make


@pytest.fixture(scope="module")
def computed_once() -> Iterator[None]:
    """The library computes each model once for all tests."""
    original = reference_process.run

    @cache
    def run(model: Path, inputs: str, options: tuple[str, ...]) -> dict[str, Any]:
        return original(model, json.loads(inputs), options, lambda _: None)

    patch = pytest.MonkeyPatch()
    patch.setattr(
        reference_process,
        "run",
        lambda model, inputs, options, _: run(model, json.dumps(inputs), tuple(options)),
    )
    yield
    patch.undo()


@pytest.fixture(scope="module")
def serving(right: Callable[[str], Path], serve_module: Callable[..., ServerProcess]) -> Callable[[str, str], Any]:
    """`serving("rerank", "fp32")` returns a server of the right model, which starts once for all tests."""
    return cache(lambda task, precision: serve_module("--model", str(right(task)), "--precision", precision))


@pytest.fixture
def server(serving: Callable[[str, str], ServerProcess]) -> ServerProcess:
    """A server of the right embedding model."""
    return serving("embed", "fp32")


def compared(target: ServerConnection, folder: Path) -> library.LibraryComparison:
    outputs = target.request([QUERY, *library.TEXTS] if target.task == "rerank" else list(library.TEXTS))
    return library.compare(outputs, {**target.info, "task": target.task}, folder)


def judged(folder: Path, right: Path, task: str, precision: str, limit: int | None = None) -> library.LibraryComparison:
    """Compare what a server of `folder` would return: the fp32 reference, because each start takes seconds."""
    inputs = [[QUERY, text] for text in library.TEXTS] if task == "rerank" else list(library.TEXTS)
    found = reference(str(folder), inputs, limit)
    outputs = found["scores"] if task != "embed" else [decode(text) for text in found["embeddings"]]
    limits = {"max_input_tokens": task_config.read(task, folder, limit).max_tokens}
    info = {"task": task, "precision": {"effective": precision}, "limits": limits, "model": {"sha256": "other"}}
    return library.compare(outputs, info, right)


@pytest.mark.parametrize("name", FAULTS)
def test_another_model_is_found(right: Callable[[str], Path], computed_once: None, tmp_path: Path, name: str) -> None:
    task, change, precision, message = FAULTS[name]
    folder = tmp_path / "model"
    shutil.copytree(right(task), folder)
    change(folder)
    with pytest.raises(InferctlError, match=message):
        judged(folder, right(task), task, precision)


@pytest.mark.parametrize(
    ("task", "precision"), [("embed", "fp32"), ("embed", "bf16"), ("rerank", "fp32"), ("classify", "fp32")]
)
def test_a_server_of_the_right_model_agrees(
    right: Callable[[str], Path],
    computed_once: None,
    serving: Callable[[str, str], ServerProcess],
    task: str,
    precision: str,
) -> None:
    found = compared(connect(serving(task, precision).url), right(task))
    assert (found.texts, found.cosine_min is None) == (12, task != "embed")
    assert found.library.startswith(f"{LIBRARIES[task]} ")
    assert 0 < found.difference <= (found.tolerance if precision == "fp32" else 0.1)


def test_the_limit_of_the_server_cuts_the_texts_of_the_library(right: Callable[[str], Path]) -> None:
    assert judged(right("embed"), right("embed"), "embed", "fp32", 9).difference < library.FP32_LIMIT


def test_a_running_server_is_compared_with_the_folder_that_it_reports(server: ServerProcess, tmp_path: Path) -> None:
    done = inferctl("verify", "--url", server.url, "--against", library.NAME, "--json", cwd=tmp_path, code=0)
    found = json.loads(done.stdout)["library"]
    assert found["difference"] <= library.FP32_LIMIT
    assert found["cosine_min"] > 0.99999


@pytest.mark.slow
def test_a_server_is_started_for_a_model_folder(right: Callable[[str], Path], tmp_path: Path) -> None:
    done = inferctl("verify", "--model", str(right("rerank")), *FP32, "--against", library.NAME, cwd=tmp_path, code=0)
    assert f"equals {library.NAME} " in done.stderr


@pytest.mark.slow
def test_each_task_has_its_library(serving: Callable[[str, str], ServerProcess], tmp_path: Path) -> None:
    done = inferctl(
        "verify", "--url", serving("classify", "fp32").url, "--against", "transformers", cwd=tmp_path, code=0
    )
    assert "equals transformers " in done.stderr
    done = inferctl("verify", "--url", serving("embed", "fp32").url, "--against", "transformers", cwd=tmp_path, code=2)
    assert f"--against {library.NAME}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("where", ["module", "architecture"])
def test_code_of_a_folder_is_not_run_and_the_reason_is_named(
    right: Callable[[str], Path], server: ServerProcess, tmp_path: Path, where: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(right("embed"), folder)
    for name in ("own", "sentence_transformers"):
        (folder / f"{name}.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Model: pass\n")
    if where == "module":
        entry = {"idx": 9, "name": "9", "path": "", "type": "own.Model"}
        modules_changed(lambda listed: listed.append(entry))(folder)
    else:
        edit(folder / "config.json", {"auto_map": {"AutoModel": "own.Model"}})
    done = inferctl("verify", "--url", server.url, "--model", ".", "--against", library.NAME, cwd=folder, code=3)
    assert "own.Model" in done.stderr
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "tei", "--model", "m"], "'tei'"),
        ([], "no image"),
        (["./m", "--against", library.NAME], "`inferctl verify --model ./m"),
        (["a:b", "--url", "http://127.0.0.1:1", "--against", library.NAME], "two servers"),
        (["a:b", *FP32], "--precision"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_library_adds_the_token_that_the_server_adds(tmp_path: Path) -> None:
    folder = saved_models.save(tmp_path, "qwen3", LAST, {})
    edit(folder / "tokenizer.json", {"post_processor": None})
    edit(folder / "tokenizer_config.json", {"add_eos_token": True, "eos_token": "[SEP]"})
    texts = ["a", "two words", "a long text " * 100]
    assert agree(folder, texts)
    edit(folder / "tokenizer_config.json", {"add_eos_token": False})
    assert agree(folder, texts)


def agree(folder: Path, texts: list[str]) -> bool:
    found = [reference(str(folder), texts, with_library=each)["embeddings"] for each in (False, True)]
    rows = [[decode(text) for text in each] for each in found]
    return max(abs(x - y) for a, b in zip(*rows, strict=True) for x, y in zip(a, b, strict=True)) < 1e-5


class HostEngine:
    """An engine whose containers are processes of this machine, with a server that runs already."""

    def __init__(self, server: ServerProcess, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.id = model, "host"
        monkeypatch.setattr(verify, "free_port", lambda: int(server.url.rpartition(":")[2]))

    def info(self) -> DockerInfo:
        return DockerInfo("28", "linux/amd64", True, (), cdi_gpu=False)

    def start(self, *_: Any) -> HostEngine:
        return self

    def __enter__(self) -> HostEngine:
        return self

    def __exit__(self, *_: object) -> None: ...

    def state(self) -> ContainerState:
        return ContainerState(True, None, False, "")

    def run_with_input(self, _: str, options: Any, data: bytes, seconds: float) -> tuple[int, str, str]:
        words = [str(self.model) if word == IMAGE_FOLDER else word for word in (*options.entrypoint, *options.command)]
        done = subprocess.run(
            [sys.executable, *words[1:]], input=data, capture_output=True, timeout=seconds, env=os.environ, check=False
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.slow
def test_the_verification_of_an_image_compares_with_the_library(
    right: Callable[[str], Path],
    computed_once: None,
    server: ServerProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine: Any = HostEngine(server, right("embed"), monkeypatch)
    image = ImageInfo("x", (), (), 0, "", "", {}, ("python3",), (), {}, ())
    wrong, unloadable = tmp_path / "wrong", tmp_path / "unloadable"
    for folder in (wrong, unloadable):
        shutil.copytree(right("embed"), folder)
    noise(0.1)(wrong)
    edit(unloadable / "config.json", {"auto_map": {"AutoModel": "own.Model"}})

    def ended(model: Path, *, requires: bool = False) -> tuple[verify.Verified, list[str]]:
        options = verify.VerifyOptions(library_models={"": model}, requires_library=requires)
        # Weights that are downloaded are not compared with fp32, which saves time.
        labels = {} if model == right("embed") else {"io.inferctl.model.weights": "download"}
        notes, (verified,) = tiny.drained(verify.verify(engine, replace(image, labels=labels), options))
        return verified, [note.text for note in notes]

    verified, _ = ended(right("embed"))
    assert verified.library is not None
    assert verified.library.difference < library.FP32_LIMIT
    assert verified.cosine_min is not None
    assert verified.texts == 8 and verified.library.texts == 12
    with pytest.raises(InferctlError, match="12 of 12 texts differ"):
        ended(wrong)
    # A build goes on with a note, because the library may be too old. A user who asks for it gets an error.
    verified, notes = ended(unloadable)
    assert verified.library is None
    assert "own.Model" in notes[-1]
    with pytest.raises(library.NotComparedError, match=r"own\.Model"):
        ended(unloadable, requires=True)


@pytest.mark.slow
def test_the_verification_of_an_image_compares_the_scores_of_a_classifier(
    right: Callable[[str], Path],
    computed_once: None,
    serving: Callable[[str, str], ServerProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = right("classify")
    engine: Any = HostEngine(serving("classify", "fp32"), model, monkeypatch)
    image = ImageInfo("x", (), (), 0, "", "", {}, ("python3",), (), {}, ())
    running = verify.verify(engine, image, verify.VerifyOptions(library_models={"": model}))
    verified: verify.Verified = tiny.drained(running)[1][0]
    assert (verified.task, verified.texts, verified.dimensions, verified.cosine_min) == ("classify", 8, None, None)
    assert verified.score_difference is not None and verified.score_difference < 1e-5
    assert verified.library is not None and verified.library.difference < library.FP32_LIMIT
