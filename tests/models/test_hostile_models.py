"""Model folders of an attacker: nothing in them is executed, nothing outside of them is read, memory is bounded."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from inferctl import cli
from inferctl.core.errors import UsageError
from inferctl.models import conversion, model
from tests.models.model_folders import write_model
from tests.processes import inferctl
from tests.tiny_models import make_tokenizer

if TYPE_CHECKING:
    import torch


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Import what takes seconds when the first test runs, not in each process that collects tests."""
    global torch
    import torch


@dataclass
class Outside:
    """A folder next to the model that must not be read, and a file that code of the model would write."""

    folder: Path
    mark: Path
    opened: list[str] = field(default_factory=list)


_watched: Outside | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path.startswith(f"{_watched.folder}/"):
            _watched.opened.append(path)


sys.addaudithook(_audit)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    global _watched
    folder = tmp_path.resolve() / "outside"
    write_model(folder, {"a": [2, 3]})
    for name in ("secret.txt", "tokenizer.json"):
        (folder / name).write_text("secret")
    torch.save({"secret": torch.ones(3)}, folder / "pytorch_model.bin")
    _watched = Outside(folder, tmp_path / "mark")
    yield _watched
    _watched = None


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("bert").save_pretrained(folder)
    return folder / "tokenizer.json"


@pytest.fixture
def folder(tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid model folder, and the current folder next to it."""
    monkeypatch.chdir(tmp_path)
    found = write_model(tmp_path / "model", {"a": [2, 3]})
    (found / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    (found / "1_Pooling").mkdir()
    (found / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean", "word_embedding_dimension": 8}')
    write_modules(found, "1_Pooling")
    return found


def write_modules(folder: Path, path: object, kind: str = "Pooling") -> None:
    modules = [("Transformer", ""), (kind, path)]
    listed = [{"path": where, "type": f"sentence_transformers.models.{name}"} for name, where in modules]
    (folder / "modules.json").write_text(json.dumps(listed))


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def changed(**settings: Any) -> Callable[[Path], object]:
    """Change `config.json`."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def linked(name: str, target: str) -> Callable[[Path], object]:
    def link(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return link


def pipe(name: str) -> Callable[[Path], object]:
    """Replace a file by a pipe, which a reader waits for without an end."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def modules_in(path: object) -> Callable[[Path], object]:
    return lambda folder: write_modules(folder, path)


def module_through_a_link(folder: Path) -> None:
    (folder / "2_Link").symlink_to(folder.parent / "outside")
    write_modules(folder, "2_Link")


def module_in_a_dotted_folder(folder: Path) -> None:
    (folder / "1_Pooling").rename(folder / ".pooling")
    write_modules(folder, ".pooling")


def header(text: str, length: int | None = None) -> Callable[[Path], object]:
    """Replace the weights by a header alone."""
    data = struct.pack("<Q", len(text) if length is None else length) + text.encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


def tensor(**settings: Any) -> Callable[[Path], object]:
    return header(json.dumps({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} | settings}))


def hole(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, size)


def index(name: str, file: object) -> Callable[[Path], object]:
    """Add an index of shards. An index of pickles replaces the safetensors."""

    def add(folder: Path) -> None:
        if name.startswith("pytorch"):
            (folder / "model.safetensors").unlink()
        (folder / name).write_text(json.dumps({"weight_map": {"a": file}}))

    return add


def huge_generator(folder: Path) -> None:
    (folder / "modules.json").unlink()
    sizes = dict.fromkeys(("hidden_size", "vocab_size", "num_attention_heads", "max_position_embeddings"), 10**300)
    changed(architectures=["LlamaForCausalLM"], num_hidden_layers=2, **sizes)(folder)


ALL = ("check", "convert", "serve")
DEEP = "[" * 200_000
# Name -> what is wrong with the folder, and the commands that reject it.
FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "module-in-parent": (modules_in("../outside"), ALL),
    "module-in-parent-of-a-child": (modules_in("1_Pooling/../../outside"), ALL),
    "module-at-root": (modules_in("/etc"), ALL),
    "module-outside-of-the-digest": (module_in_a_dotted_folder, ALL),
    "module-with-nul": (modules_in("a\0b"), ALL),
    "module-with-number": (modules_in(5), ALL),
    "module-through-a-link": (module_through_a_link, ALL),
    "index-in-parent": (index("model.safetensors.index.json", "../outside/model.safetensors"), ALL),
    "index-at-root": (index("model.safetensors.index.json", "/etc/passwd"), ALL),
    "index-of-lists": (index("model.safetensors.index.json", ["x"]), ()),
    "pickle-index-in-parent": (index("pytorch_model.bin.index.json", "../outside/pytorch_model.bin"), ALL),
    "pickle-index-absent": (index("pytorch_model.bin.index.json", "no.bin"), ALL),
    "config-is-a-link": (linked("config.json", "../outside/config.json"), ALL),
    "weights-are-a-link": (linked("model.safetensors", "../outside/model.safetensors"), ALL),
    "vocabulary-is-a-link": (linked("vocab.txt", "../outside/secret.txt"), ALL),
    "template-is-a-link": (linked("chat_template.jinja", "/etc/passwd"), ALL),
    "tokenizer-is-a-device": (linked("tokenizer.json", "/dev/zero"), ALL),
    "tokenizer-is-a-pipe": (pipe("tokenizer.json"), ALL),
    "modules-are-a-device": (linked("modules.json", "/dev/zero"), ALL),
    "modules-are-a-pipe": (pipe("modules.json"), ALL),
    "pooling-is-a-pipe": (pipe("1_Pooling/config.json"), ALL),
    "library-file-is-a-pipe": (pipe("config_sentence_transformers.json"), ALL),
    "config-is-a-pipe": (pipe("config.json"), ALL),
    "weights-are-a-pipe": (pipe("model.safetensors"), ALL),
    "config-is-deep": (written("config.json", DEEP), ALL),
    "config-is-a-list": (written("config.json", "[1]"), ALL),
    "config-is-large": (hole("config.json", 17 * 2**20), ALL),
    "config-is-huge": (hole("config.json", 2**36), ALL),
    "modules-are-deep": (written("modules.json", DEEP), ALL),
    "tokenizer-is-deep": (written("tokenizer.json", DEEP), ("check", "serve")),
    "tokenizer-is-huge": (hole("tokenizer.json", 2**36), ALL),
    "vocabulary-is-huge": (lambda folder: (written("vocab.txt", "a")(folder), hole("vocab.txt", 2**36)(folder)), ALL),
    "header-is-longer-than-the-file": (header("{}", 2**62), ALL),
    "header-is-deep": (header(DEEP), ALL),
    "header-is-a-list": (header("[1]"), ALL),
    "shape-is-negative": (tensor(shape=[-1]), ALL),
    "shape-is-text": (tensor(shape="ab"), ALL),
    "offsets-are-text": (tensor(data_offsets=["a", "b"]), ALL),
    "dtype-is-a-number": (tensor(dtype=5), ALL),
    "module-unknown": (lambda folder: write_modules(folder, "1_Pooling", "Shell"), ("check", "serve")),
    "prompts-are-a-number": (
        written("config_sentence_transformers.json", '{"prompts": 5, "default_prompt_name": "x"}'),
        ("check", "serve"),
    ),
    "prompt-name-is-a-list": (
        written("config_sentence_transformers.json", '{"prompts": {"a": "b"}, "default_prompt_name": [1]}'),
        ("check", "serve"),
    ),
    "architecture-is-a-number": (changed(architectures=5), ()),
    "labels-are-a-number": (changed(architectures=["XForSequenceClassification"], id2label=5), ("check", "serve")),
    "generator-sizes-are-huge": (huge_generator, ("check",)),
    "layers-are-many": (changed(num_hidden_layers=10**9), ("check", "serve")),
    "layers-of-a-part-are-many": (changed(text_config={"n_layers": 10**9}), ("check", "serve")),
    "sizes-are-huge": (changed(hidden_size=10**300, vocab_size=10**300, max_position_embeddings=10**300), ()),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("command", ["check", "convert", "serve"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_rejected_without_reading_outside_of_it(
    name: str, command: str, folder: Path, outside: Outside, capsys: pytest.CaptureFixture[str]
) -> None:
    change, rejecting = FOLDERS[name]
    change(folder)
    if command == "serve" and command not in rejecting:
        return  # what starts is not hostile to the server
    arguments = {
        "check": ["check", "--model", "./model", "--hardware", "cpu"],
        "convert": ["convert", "./model", "./new"],
        "serve": ["serve", "--model", "./model", "--engine", "echo", "--port", "0"],
    }[command]
    code = cli.run(arguments)
    out, err = capsys.readouterr()
    # `convert` also ends with 2 if there is nothing to convert.
    assert code == 2 if command in rejecting or command == "convert" else code == 0, out + err
    assert "hint: " in out + err
    assert "secret" not in (out + err).replace("secret.txt", "")
    assert outside.opened == []
    assert not Path("new").exists()


def test_links_to_the_blobs_of_a_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--m"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        place = snapshot / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / str(number))
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    assert model.find("org/m", "abc", {"HF_HOME": str(tmp_path)}).parameters == 6
    (tmp_path / "link").symlink_to(snapshot)
    assert model.find(str(tmp_path / "link")).parameters == 6, "the folder itself may be a link"
    # A volume of Kubernetes has links within its folder.
    (folder / "..data").mkdir()
    (folder / "..data" / "config.json").write_bytes((snapshot / "config.json").read_bytes())
    (folder / "config.json").symlink_to("..data/config.json")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).symlink_to(snapshot / name)
    assert model.find(str(folder)).parameters == 6


def calls(function: Callable[..., object], *arguments: object) -> object:
    """Return an object whose pickle calls a function when it is loaded."""

    class Call:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return function, arguments

    return Call()


def saved(value: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def archive(compression: int, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(f"archive/{name.replace('_', '.')}", data)
    return buffer.getvalue()


def lying_archive() -> bytes:
    """Return an archive of torch whose directory says that a part has 2 GiB."""
    data = bytearray(saved({"a": torch.ones(3)}))
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    return bytes(data)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("../mark", "pickle", "storages", "tensors"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


def torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


# Name -> the bytes of a pickle, made with the file that its code would write; and a part of the message.
PICKLES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "calls-the-shell": (lambda mark: saved({"a": calls(os.system, f"touch {mark}")}), "system"),
    "calls-the-shell-legacy": (lambda mark: saved({"a": calls(os.system, f"touch {mark}")}, legacy=True), "system"),
    "calls-the-shell-plain": (lambda mark: pickle.dumps(calls(os.system, f"touch {mark}"), protocol=2), "system"),
    "calls-the-shell-protocol-4": (lambda mark: pickle.dumps(calls(os.system, f"touch {mark}"), protocol=4), "weights"),
    "calls-eval": (lambda mark: saved({"a": calls(eval, f"open({str(mark)!r}, 'w')")}), "eval"),
    "calls-open": (lambda mark: saved({"a": calls(open, str(mark), "w")}), "open"),
    "calls-torch-load": (lambda mark: saved({"a": calls(torch.load, str(mark))}), "load"),
    "compressed-bomb": (lambda _: archive(zipfile.ZIP_DEFLATED, data_pkl=bytes(2**26)), "compressed"),
    "archive-with-false-sizes": (lambda _: lying_archive(), "archive"),
    "archive-without-structure": (lambda _: archive(zipfile.ZIP_STORED, x=b"1"), "cannot be read"),
    "one-number-repeated": (lambda _: saved({"a": torch.zeros(1).expand(10**6, 10**6)}), "tensors would have"),
    "many-names-of-one-storage": (
        lambda _: saved(dict.fromkeys(map(str, range(500)), torch.zeros(2**18))),
        "tensors would have",
    ),
    "meta-tensor": (lambda _: saved({"a": torch.empty(10**12, device="meta")}), "not a plain tensor"),
    "sparse-tensor": (lambda _: saved({"a": torch.eye(3).to_sparse()}), "not a plain tensor"),
    "complex-tensor": (lambda _: saved({"a": torch.ones(3, dtype=torch.complex64)}), "not a plain tensor"),
    "nested-table": (lambda _: saved({"state_dict": {"a": torch.ones(3)}}), "not a plain tensor"),
    "number-as-name": (lambda _: saved({5: torch.ones(3)}), "not a plain tensor"),
    "list": (lambda _: saved([torch.ones(3)]), "table of tensors"),
    "torchscript": (lambda _: torchscript(), "not an archive of torch"),
    "tar": (lambda _: tar(), ""),
    "truncated": (lambda _: saved({"a": torch.ones(99)})[:-200], ""),
    "truncated-legacy": (lambda _: saved({"a": torch.ones(99)}, legacy=True)[:-20], ""),
    "empty": (lambda _: b"", ""),
    "git-lfs": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", ""),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_rejected_and_runs_nothing(name: str, folder: Path, outside: Outside) -> None:
    make, message = PICKLES[name]
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(make(outside.mark))
    (folder.parent / "new").mkdir()
    with pytest.raises(UsageError, match=message or None) as caught:
        conversion.convert(folder, folder.parent / "new")
    assert caught.value.hint
    assert not outside.mark.exists()
    assert not (folder.parent / "new" / "config.json").exists(), "no half folder can be served"
    with pytest.raises(UsageError, match="pickle") as refused:
        model.find(str(folder))
    assert "inferctl convert" in (refused.value.hint or ""), "a server never reads it"


def test_a_pickle_that_is_a_link_out_of_the_folder_is_not_read(folder: Path, outside: Outside) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").symlink_to(outside.folder / "pytorch_model.bin")
    (folder.parent / "new").mkdir()
    for read in (lambda: conversion.convert(folder, folder.parent / "new"), lambda: model.find("model")):
        with pytest.raises(UsageError, match="outside"):
            read()
    assert outside.opened == []


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))


@pytest.mark.parametrize(
    "change",
    [
        hole("config.json", 2**40),
        written("config.json", "[" + "{}," * 5_000_000 + "1]"),
        written("model.safetensors.index.json", "[" + "{}," * 5_000_000 + "1]"),
        header("[" + "{}," * 5_000_000 + "1]"),
        header(" " * 1000, 99_000_000),
        hole("tokenizer.json", 2**40),
    ],
    ids=["hole", "many-objects", "index", "header", "short-header", "tokenizer"],
)
def test_memory_is_bounded_when_a_folder_is_checked(change: Callable[[Path], object], folder: Path) -> None:
    change(folder)
    done = inferctl("check", "--model", "./model", preexec_fn=limit_memory, code=2)
    assert "Traceback" not in done.stderr
    assert "hint: " in done.stdout
