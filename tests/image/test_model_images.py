"""Tests models as images without Docker: names, labels, layers, build contexts, and archives that attack the puller."""

from __future__ import annotations

import datetime
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inferctl.config import settings, spec
from inferctl.config.spec import Spec
from inferctl.core.errors import InferctlError, SpecError, UsageError
from inferctl.facts import catalog
from inferctl.image import locks, model_image, model_transfer, pin, render
from inferctl.image.model_image import ModelImage
from inferctl.models import fit, image_source
from inferctl.models import model as model_folder
from inferctl.models.model import ModelFolder
from inferctl.models.size import locate, size_of
from inferctl.reading import embedding_config, space
from tests.image import sharded

DIGEST = f"sha256:{'a' * 64}"
NAME = "registry.example.com/models/minilm"
CPU = catalog.base("cpu")
TODAY = datetime.date(2026, 1, 1)


@pytest.mark.parametrize(
    ("source", "reference", "digest"),
    [
        (f"oci://{NAME}@{DIGEST}", f"{NAME}@{DIGEST}", DIGEST),
        (f"oci://{NAME}:v1@{DIGEST}", f"{NAME}:v1@{DIGEST}", DIGEST),
        (f"oci://{NAME}:v1", f"{NAME}:v1", None),
        (f"oci://{NAME}", f"{NAME}:latest", None),
        ("oci://localhost:5000/minilm", "localhost:5000/minilm:latest", None),
        (f"oci://{NAME}@sha256:12", None, None),
        ("oci://", None, None),
        ("oci://../../etc", None, None),
        ("oci://Registry/UPPER", None, None),
        (f"oci://{NAME}:v1\n", None, None),
    ],
)
def test_a_source_names_an_image(source: str, reference: str | None, digest: str | None) -> None:
    assert image_source.is_image(source)
    if reference is None:
        with pytest.raises(UsageError, match="is not the name of an image"):
            image_source.reference(source)
        with pytest.raises(SpecError):
            settings.resolve(None, {}, {"model.source": source})
        return
    assert (image_source.reference(source), image_source.digest(source)) == (reference, digest)
    found = settings.resolve(None, {}, {"model.source": source}).spec
    assert (found.name, found.model.source) == ("minilm", source)


def test_a_spec_elsewhere_names_the_same_image(tmp_path: Path) -> None:
    (tmp_path / "inferctl.yaml").write_text(f"name: m\nmodel: {{source: 'oci://{NAME}:v1'}}\n")
    assert settings.resolve(settings.read(tmp_path / "inferctl.yaml"), {}, {}).spec.model.source == f"oci://{NAME}:v1"


@pytest.mark.parametrize("model", [{"revision": "main"}, {"weights": "download"}])
def test_settings_of_a_hub_model_are_rejected(model: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"revision is for hub ids|requires a hub id"):
        spec.Model.model_validate({"source": f"oci://{NAME}:v1", **model})


def test_the_root_of_a_model_image_is_no_model_folder(folder: Path) -> None:
    root = folder.parent / "volume"
    sharded.copy(folder, root / image_source.FOLDER)
    with pytest.raises(UsageError) as caught:
        model_folder.find(str(root))
    assert "model.source" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "names",
    [
        ["../config.json"],
        ["a/../../b.json"],
        ["/etc/passwd"],
        ["a//b.json"],
        ["./config.json"],
        ["a/"],
        [""],
        ["a\\b.json"],
        ["C:/x.json"],
        ["a\nb.json"],
        ["a\x00b.json"],
        ["\u202ejson.gnp"],
        ["\udcff.json"],
        ["a" * 256],
        ["config.json", "Config.json"],
        ["a/x.json", "A/y.json"],
        ["a", "a/b.json"],
        ["straße.json", "STRASSE.json"],
        [f"{number}.json" for number in range(2001)],
    ],
    ids=lambda names: ascii(names[0])[:20] if len(names) < 3 else "many",
)
def test_names_that_leave_the_folder_or_overwrite_each_other_are_rejected(names: list[str]) -> None:
    with pytest.raises(UsageError):
        image_source.check_names(names, "x")
    with pytest.raises(UsageError):
        model_image.read("x", labels(files=dict.fromkeys(names, 1)), ())


def test_names_of_models_are_accepted() -> None:
    image_source.check_names(
        ["config.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "a b+c(1).txt", "ü.json"], "x"
    )


def labels(**values: Any) -> dict[str, str]:
    good = {"sha256": "0" * 64, "files": {"config.json": 2}, "parameters": "1", "config": {}}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in {**good, **values}.items()}
    return {f"io.inferctl.model.{name}": text for name, text in texts.items()}


@pytest.mark.parametrize(
    "values",
    [
        {"sha256": "12"},
        {"files": ""},
        {"files": "[]"},
        {"files": "{}"},
        {"files": '{"a": -1}'},
        {"files": '{"a": true}'},
        {"files": '{"a": "1"}'},
        {"files": "[" * 100_000},
        {"config": "[1]"},
        {"parameters": "many"},
        {"parameters": "9" * 4000},
        {"parameters": "-1"},
        {"files": json.dumps({"a": 10**30})},
    ],
    ids=lambda values: str(values)[:30],
)
def test_other_labels_are_not_a_model(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is not a model image"):
        model_image.read("x", labels(**values), ())
    with pytest.raises(UsageError, match="is not a model image"):
        model_image.read("x", {}, ())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sharded.write(tmp_path / "model")


def described(folder: Path) -> ModelImage:
    """Return what `inspect` returns for a push of `folder`."""
    found = ModelFolder(folder)
    files = model_transfer._files(found)
    return model_image.read(f"{NAME}@{DIGEST}", model_image.labels_of(found, files, "org/m", "1" * 40, "mit"), ())


def test_the_label_of_spaces_is_that_of_a_model_that_a_server_computes(folder: Path, minilm: Path) -> None:
    found = space.read(minilm, embedding_config.read(minilm))
    assert described(minilm).space == ",".join(each.name for each in found.values())
    assert described(folder).space == ""


def test_the_labels_say_what_the_model_is(folder: Path) -> None:
    found = described(folder)
    assert found.sha256 == ModelFolder(folder).digest
    assert (found.architecture, found.task, found.number_formats, found.parameters) == (
        "BertModel",
        "embed",
        "F32",
        2 * sharded.SHARD_BYTES // 4,
    )
    assert (found.source, found.revision, found.license) == ("org/m", "1" * 40, "mit")
    assert found.files == {
        file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()
    }
    assert model_transfer._license(folder) == "apache-2.0"


def test_the_size_of_a_model_is_known_without_its_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(folder.parent / "home"))
    found = described(folder)
    monkeypatch.setattr(model_image, "inspect", lambda _: found)
    of_image = size_of(locate(model_spec(f"oci://{NAME}:v1"), model_image.facts))
    of_folder = size_of(locate(model_spec(str(folder)), model_image.facts))
    assert isinstance(of_image, fit.ModelSize)
    assert of_image == of_folder


@pytest.mark.parametrize(("shards", "layers"), [(0, 1), (1, 2), (100, 101), (101, 52), (163, 83), (1500, 101)])
def test_each_weight_file_is_a_layer_up_to_what_an_engine_mounts(shards: int, layers: int) -> None:
    files = {f"model-{number:05}.safetensors": 1 for number in range(shards)} | {"config.json": 1, "a/b.json": 1}
    found = model_image.groups(files)
    assert len(found) == layers
    assert found[0] == ["a/b.json", "config.json"]
    assert sorted(name for layer in found for name in layer) == sorted(files)


def context(folder: Path) -> bytes:
    stream = io.BytesIO()
    model_transfer._write_context(stream, folder, "FROM scratch\n", layers_of(folder))
    return stream.getvalue()


def layers_of(folder: Path) -> list[dict[str, int]]:
    files = model_transfer._files(ModelFolder(folder))
    return [{name: files[name] for name in layer} for layer in model_image.groups(files)]


def test_equal_files_make_equal_contexts_whatever_their_times_modes_and_folder(folder: Path, tmp_path: Path) -> None:
    copied = sharded.copy(folder, tmp_path / "other name")
    assert context(copied) == context(folder)
    linked = tmp_path / "models--org--m" / "snapshots" / "1"
    blobs = tmp_path / "models--org--m" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(each for each in folder.rglob("*") if each.is_file()):
        link = linked / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(number)).write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert context(linked) == context(folder)
    with tarfile.open(fileobj=io.BytesIO(context(linked))) as archive:
        assert {(each.uid, each.gid, each.mtime) for each in archive} == {(0, 0, render.EPOCH)}
        assert {each.mode for each in archive} == {0o644, 0o755}
        assert all(each.isreg() or each.isdir() for each in archive)


def test_labels_are_quoted_for_a_dockerfile() -> None:
    text = model_transfer.dockerfile({"a": 'x "y" $HOME \\ ${Z}\nRUN evil'}, 2)
    assert text == (
        'FROM scratch\nCOPY --link 0 /\nCOPY --link 1 /\nLABEL a="x \\"y\\" \\$HOME \\\\ \\${Z} RUN evil"\n'
    )


@pytest.mark.parametrize("count", [980, 2000])  # 980 have less than 60,000 bytes without their backslashes
def test_a_large_configuration_is_left_out_and_a_long_license_is_an_error(tmp_path: Path, count: int) -> None:
    names = {str(number): f"label {number} {'x' * 40}" for number in range(count)}
    large = sharded.write(tmp_path / "large", id2label=names)
    assert described(large).config is None
    with pytest.raises(UsageError, match="licenses") as caught:
        model_image.labels_of(ModelFolder(large), {"config.json": 1}, None, None, "x" * 70_000)
    assert "names" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "count", "accepted"),
    [
        ("model-{number:05}-of-{count:05}.safetensors", 1200, True),
        ("model-{number:05}-of-{count:05}.safetensors", 1500, False),
        ("{number}.json", 2000, True),
        ("y" * 60 + "{number}.json", 1000, False),
    ],
)
def test_the_names_of_all_files_fit_a_label(tmp_path: Path, name: str, count: int, accepted: bool) -> None:
    files = {name.format(number=number, count=count): 4_999_999_999 for number in range(count)}
    if accepted:
        image_source.check_names(files, "x")
        assert model_image.labels_of(ModelFolder(sharded.write(tmp_path / "model")), files, None, None, None)
        return
    # No folder: the error comes before the model is read, which takes long.
    with pytest.raises(UsageError, match=f"{count:,} files"):
        model_image.labels_of(ModelFolder(tmp_path / "none"), files, None, None, None)


def test_the_index_of_the_shards_is_not_read_for_each_of_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, names = model_folder.weight_map, list[Path]()

    def counting(index: Path) -> dict[str, str]:
        names.append(index)
        return read(index)

    monkeypatch.setattr(model_folder, "weight_map", counting)
    found = ModelFolder(folder).weight_files
    assert [file.name for file in found] == list(sharded.SHARDS)
    assert len(names) == 1


@pytest.mark.timeout(20)
def test_a_push_does_not_wait_for_a_pipe(folder: Path) -> None:
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    with pytest.raises(UsageError, match=r"README\.md is not a file"):
        next(model_transfer.push(ModelFolder(folder), str(folder), f"{NAME}:v1"))


@pytest.mark.parametrize("kind", ["link", "device", "case"])
def test_a_hostile_folder_is_not_pushed(folder: Path, tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("private")
    if kind == "link":
        (folder / "LICENSE").symlink_to(secret)
    elif kind == "device":
        os.mkfifo(folder / "vocab.txt")
    else:
        (folder / "Config.json").write_text("{}")
    with pytest.raises(UsageError):
        model_transfer._files(model_folder.find(str(folder)))


@pytest.mark.parametrize("change", [b"", b"more" * 1_000_000, None], ids=["shorter", "longer", "removed"])
def test_a_file_that_changes_during_a_push_is_an_error(folder: Path, change: bytes | None) -> None:
    layers = layers_of(folder)
    (folder / sharded.SHARDS[1]).unlink()
    if change is not None:
        (folder / sharded.SHARDS[1]).write_bytes(change)
    with pytest.raises(InferctlError, match="changed while it was pushed"):
        model_transfer._write_context(io.BytesIO(), folder, "FROM scratch\n", layers)


Entry = Callable[[tarfile.TarFile], None]


def entry(name: str, content: bytes | None = b"{}", **fields: Any) -> Entry:
    def add(archive: tarfile.TarFile) -> None:
        found = tarfile.TarInfo(name)
        found.size = len(content or b"")
        for key, value in fields.items():
            setattr(found, key, value)
        archive.addfile(found, io.BytesIO(content) if content is not None else None)

    return add


FOLDER = entry("model/", None, type=tarfile.DIRTYPE)
CONFIG = entry("model/config.json")


@pytest.mark.parametrize(
    "entries",
    [
        [FOLDER, entry("model/config.json", None, type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        [FOLDER, entry("model/config.json", None, type=tarfile.LNKTYPE, linkname="../../outside.txt")],
        [FOLDER, entry("model/config.json", None, type=tarfile.CHRTYPE, devmajor=1, devminor=5)],
        [FOLDER, entry("model/config.json", None, type=tarfile.FIFOTYPE)],
        [entry("model", None, type=tarfile.SYMTYPE, linkname=".."), CONFIG],
        [FOLDER, CONFIG, entry("model/other.json")],
        [FOLDER, CONFIG, entry("etc/passwd")],
        [FOLDER, CONFIG, entry("/model/config.json")],
        [FOLDER, entry("model/../../outside.txt"), CONFIG],
        [FOLDER, CONFIG, CONFIG],
        [FOLDER, CONFIG, entry("model/CONFIG.json")],
        [FOLDER, entry("model/config.json", b"{ }")],
        [FOLDER, CONFIG, entry("model/more/", None, type=tarfile.DIRTYPE)],
        [FOLDER, entry("model/config.json", None, type=tarfile.DIRTYPE)],
        [FOLDER],
        [],
    ],
)
def test_an_image_with_other_files_than_its_labels_list_is_rejected(entries: list[Entry], tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("untouched")
    target = tmp_path / "target"
    target.mkdir()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for add in entries:
            add(archive)
    stream.seek(0)
    with pytest.raises(UsageError, match="its labels"):
        model_transfer._extract(stream, model_image.read("x", labels(), ()), target)
    assert outside.read_text() == "untouched"
    assert sorted(tmp_path.iterdir()) == [outside, target]
    assert all(each.is_file() and not each.is_symlink() and each.name == "config.json" for each in target.rglob("*"))


def test_the_files_of_a_context_are_those_that_a_pull_accepts(folder: Path, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as merged, tarfile.open(fileobj=io.BytesIO(context(folder))) as layers:
        for each in layers.getmembers()[:-1]:  # without the Dockerfile
            each.name = each.name.partition("/")[2]
            if each.name:
                merged.addfile(each, layers.extractfile(each))
    stream.seek(0)
    target = tmp_path / "target"
    target.mkdir()
    model_transfer._extract(stream, described(folder), target)
    assert ModelFolder(target).digest == ModelFolder(folder).digest
    assert (target / "README.md").read_text() == sharded.CARD


def model_spec(source: str, weights: str = "mount") -> Spec:
    return Spec.model_validate({"name": "m", "model": {"source": source, "weights": weights}, "image": {"base": "cpu"}})


@pytest.mark.parametrize(
    ("source", "tracked", "pinned"),
    [
        (f"oci://{NAME}", f"oci://{NAME}", False),
        (f"oci://{NAME}:v1", f"oci://{NAME}:v1", False),
        (f"oci://{NAME}:v1@{DIGEST}", f"oci://{NAME}:v1", True),
        (f"oci://{NAME}@{DIGEST}", None, True),
    ],
)
def test_a_model_image_is_pinned_by_its_digest(source: str, tracked: str | None, pinned: bool) -> None:
    found = pin.pins(model_spec(source), CPU)[0]
    assert (found.path, found.current, found.tracked, found.pinned) == ("model.source", source, tracked, pinned)
    if tracked:
        text = f"model:\n  source: {source}  # ours\n"
        edited = pin.edit(text, {found.path: found.value(DIGEST)}, "x")
        assert edited == f"model:\n  source: {tracked}@{DIGEST}  # ours\n"
    findings = fit.check_image(model_spec(source), CPU, catalog.stack(CPU.stack), hub_model=False, today=TODAY)
    assert [each.topic for each in findings].count("revision") == (0 if pinned else 1)


def test_a_baked_image_has_the_layers_of_the_model_image(folder: Path) -> None:
    image = described(folder)
    spec = model_spec(f"oci://{NAME}:v1", "bake")
    arguments = (spec, CPU, catalog.stack(CPU.stack), locks.Locks("", ""), render.Provenance())
    found = render.render(*arguments, images={"m": image})
    assert f"FROM --platform=linux/amd64 {NAME}@{DIGEST} AS model\n" in found.dockerfile
    copies = re.findall(r"--target-directory=/layer/(\d)/model (.*?) &&", found.dockerfile)
    named = [(int(number), re.findall(r"'(.*?)'", names)) for number, names in copies]
    assert named == list(enumerate(model_image.groups(image.files)))
    assert all(names.startswith("-- '") for _, names in copies)  # a file may be called `-s`
    layers = ["/layer/0", "/layer/1", "/layer/2"]
    assert re.findall(r"COPY --link --from=weights (\S+) /", found.dockerfile) == 2 * layers  # also exported alone
    assert found.contexts == {}
    assert found.labels["io.inferctl.model.source"] == f"oci://{NAME}:v1"
    assert render.render(*arguments, images={"m": image}).tag == found.tag


def test_a_model_is_found_in_the_cache_by_digest_and_by_tag(tmp_path: Path, folder: Path) -> None:
    environment = {"HF_HOME": str(tmp_path / "home")}
    by_digest, by_tag = f"oci://{NAME}@{DIGEST}", f"oci://{NAME}:v1"
    for source in (by_digest, by_tag):
        with pytest.raises(UsageError, match="not in the cache") as caught:
            model_folder.find(source, environment=environment)
        assert f"inferctl model pull {source}" in (caught.value.hint or "")
    place = image_source.cache_folder(DIGEST, environment)
    place.parent.mkdir(parents=True)
    folder.rename(place)
    assert model_folder.find(by_digest, environment=environment).path == place
    assert image_source.cached(by_tag, environment) is None
    image_source.remember(by_tag, DIGEST, environment)
    assert model_folder.find(by_tag, environment=environment).path == place
    assert image_source.cached(f"oci://{NAME}:v2", environment) is None
