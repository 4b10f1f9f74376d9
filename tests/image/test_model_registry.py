"""Tests models as images with the real Docker Engine and the real registry, and with a registry that fails."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import re
import tarfile
import time
import urllib.parse
import uuid
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from inferctl import cli
from inferctl.cli import download
from inferctl.config import settings
from inferctl.config.spec import Spec
from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.image import buildx, model_image, model_transfer
from inferctl.image import registry as queries
from inferctl.image.build import model_layers
from inferctl.image.docker import DockerEngine
from inferctl.image.events import Phase
from inferctl.image.from_spec import rendered_image
from inferctl.image.model_image import ModelImage
from inferctl.models import adapter, image_source
from inferctl.models.model import ModelFolder, find
from inferctl.models.weights_folders import weights_folders
from tests.image import sharded, tiny
from tests.image.registry_proxy import RegistryProxy, proxied
from tests.models.adapters import write_adapter

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300), pytest.mark.usefixtures("engine")]
# The engine itself tries four times more, after 5, 10, 15 and 20 s.
RETRIED = pytest.mark.slow_measurement


@pytest.fixture(scope="module")
def registry() -> Iterator[RegistryProxy]:
    with proxied() as proxy:
        yield proxy


@pytest.fixture
def repository(registry: RegistryProxy) -> Iterator[str]:
    """A new repository of the registry, without faults."""
    registry.fault = lambda _method, _path: None
    registry.uploads()
    yield f"{registry.host}/inferctl-tests/{uuid.uuid4().hex}"
    registry.fault = lambda _method, _path: None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no other run has pushed."""
    folder = sharded.write(tmp_path_factory.mktemp("models") / "sharded", run=uuid.uuid4().hex)
    for name in sharded.SHARDS:
        sharded.write_shard(folder / name, uuid.uuid4().int)
    return folder


def push(folder: Path, reference: str, license_id: str | None = None, source: str | None = None) -> ModelImage:
    running = model_transfer.push(ModelFolder(folder), source or str(folder), reference, license_id, attempts=1)
    found: ModelImage = tiny.drained(running)[1]
    return found


def pull(image: ModelImage, target: Path) -> None:
    list(model_transfer.pull(image, target))


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_second_push_uploads_nothing_and_a_changed_shard_one_layer(
    registry: RegistryProxy, repository: str, model: Path, tmp_path: Path
) -> None:
    first = push(model, f"{repository}:v1")
    assert shards(registry.uploads()) == 2
    assert push(model, f"{repository}:v2") == first
    assert registry.uploads() == []
    tuned = sharded.copy(model, tmp_path / "tuned")
    sharded.write_shard(tuned / sharded.SHARDS[1], uuid.uuid4().int)
    second = push(tuned, f"{repository}:v3")
    assert shards(registry.uploads()) == 1
    assert len(set(first.layers) - set(second.layers)) == 1
    assert second.sha256 == ModelFolder(tuned).digest != first.sha256


def shards(uploads: list[int]) -> int:
    """Return the number of shards among `uploads`, which have about that size. The others are small."""
    large = [bytes_ for bytes_ in uploads if bytes_ > 20_000]
    assert all(sharded.SHARD_BYTES < bytes_ < 1.1 * sharded.SHARD_BYTES for bytes_ in large)
    return len(large)


def test_an_image_with_the_server_uploads_no_weights(
    registry: RegistryProxy, repository: str, model: Path, base_image: str, tmp_path: Path
) -> None:
    pushed = push(model, f"{repository}/model:v1")
    registry.uploads()
    flags = {"model.source": f"oci://{pushed.reference}", "model.weights": "bake", "image.base": "cpu"}
    found = rendered_image(settings.resolve(None, {}, {**flags, "image.base_image": base_image}))
    # Without the closures of torch and the server, which take minutes.
    stages = found.dockerfile.split("\nFROM ")
    stages = [
        stage for stage in stages if re.search(r"^.* AS (python|model|weights|model-layers)$", stage, re.MULTILINE)
    ]
    copies = re.findall(r"^COPY --link --from=weights .*$", found.dockerfile, re.MULTILINE)
    assert len(copies) == 2 * len(pushed.layers) == 6
    (tmp_path / "Dockerfile").write_text("\nFROM ".join(["", *stages, "python"]) + "\n" + "\n".join(copies[3:]) + "\n")
    name = f"{repository}/server:v1"
    request = buildx.BuildRequest(
        context=tmp_path,
        network="host",
        outputs=(f"type=image,name={name},push=true",),
    )
    engine = DockerEngine.connect()
    try:
        if engine.info().containerd_store:
            list(buildx.run(model_layers(request)))
        list(buildx.run(request))
    finally:
        engine.untag(name)
    assert queries.remote_image(name, model_image.PLATFORM).layers[-3:] == pushed.layers
    assert not [bytes_ for bytes_ in registry.uploads() if sharded.SHARD_BYTES < bytes_ < 1.1 * sharded.SHARD_BYTES]
    assert any(pushed.layers[1][0].partition(":")[2] in path for path in registry.mounted)


def test_equal_files_have_one_digest_whenever_and_from_wherever_they_are_pushed(
    repository: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = push(model, f"{repository}:v1")
    command = buildx.command
    # The builder's cache would hide a difference.
    monkeypatch.setattr(buildx, "command", lambda request, file: command(replace(request, no_cache=True), file))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert push(sharded.copy(model, tmp_path / "copied"), f"{repository}:v2") == first


def test_what_was_pushed_is_inspected_and_pulled(repository: str, model: Path, tmp_path: Path) -> None:
    license_id = 'Other "x" $HOME \\ end'
    pushed = push(model, f"{repository}:v1", license_id)
    found = model_image.inspect(f"oci://{repository}:v1")
    assert found == pushed == model_image.inspect(found.reference)
    assert (found.license, found.sha256) == (license_id, ModelFolder(model).digest)
    assert found.files == {name: len(data) for name, data in content(model).items()}
    assert DockerEngine.connect().image(f"{repository}:v1") is None
    pull(found, tmp_path / "new")
    assert content(tmp_path / "new") == content(model)
    (tmp_path / "empty").mkdir()
    pull(found, tmp_path / "empty")
    assert content(tmp_path / "empty") == content(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_a_model_of_a_registry_is_cached(
    registry: RegistryProxy, repository: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    pushed = push(model, f"{repository}:v1", "mit")
    by_tag, by_digest = f"oci://{repository}:v1", f"oci://{pushed.reference}"
    folder = download.pull_image(f"{repository}:v1")
    assert folder == image_source.cache_folder(pushed.digest)
    assert push(folder, f"{repository}/copy:v1", source=by_tag).digest == pushed.digest
    registry.fault = lambda _method, _path: (503, b"")
    assert {download.fetch(source, None) for source in (by_tag, by_digest)} == {ModelFolder(folder)}
    assert find(by_digest).digest == pushed.sha256


def test_an_adapter_is_pushed_and_pulled_without_the_rest_of_its_training(
    repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.layers.0.q_proj.weight": np.zeros((8, 8), np.float32)}, base / "model.safetensors")
    folder = write_adapter(tmp_path / "legal", base)
    (folder / "optimizer.json").write_text("{}")
    assert cli.run(["model", "push", str(folder), f"{repository}:v1"]) == 0
    source = capsys.readouterr().out.strip()
    found = model_image.inspect(source)
    assert (found.task, found.architecture, sorted(found.files)) == (
        "adapter",
        "LORA",
        [adapter.CONFIG, adapter.WEIGHTS],
    )
    spec = {"name": "m", "model": {"source": "org/m", "adapters": [{"name": "legal", "source": source}]}}
    pulled = download.weights(weights_folders(Spec.model_validate(spec))[1])
    assert pulled.path == image_source.cache_folder(found.digest)
    assert pulled.digest == adapter.AdapterFolder(folder).digest == found.sha256
    with pytest.raises(UsageError, match="is an adapter, not a model"):
        model_image.facts(source)


def test_the_command_line(
    repository: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command_line(*arguments: str, code: int = 0) -> str:
        """Return stdout, or stderr of a failed command."""
        assert cli.run(["model", *arguments]) == code
        out, err = capsys.readouterr()
        return err if code else out.strip()

    name = f"{repository}:v1"
    pushed = command_line("push", str(model), name)
    assert pushed.startswith(f"oci://{repository}@sha256:")
    shown = json.loads(command_line("inspect", name, "--json"))
    assert f"oci://{shown['reference']}" == pushed
    assert all(file in command_line("inspect", name) for file in content(model))
    target = str(tmp_path / "pulled")
    assert command_line("pull", pushed, "--output", target) == target
    assert "already exists" in command_line("pull", pushed, "--output", target, code=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    for output in (".", "../link", str(tmp_path / "empty")):
        assert "name a new folder in it" in command_line("pull", pushed, "--output", output, code=2)
    assert "has a digest" in command_line("push", str(model), pushed, code=2)


def interrupt(running: Generator[Any, None, Any]) -> None:
    """Close a transfer when it has begun."""
    next(event for event in running if not isinstance(event, Phase))
    running.close()


def test_an_interrupted_push_leaves_no_image(repository: str, model: Path) -> None:
    interrupt(model_transfer.push(ModelFolder(model), str(model), f"{repository}:v1", attempts=1))
    assert DockerEngine.connect().image(f"{repository}:v1") is None
    with pytest.raises(UsageError, match="not found in its registry"):
        model_image.inspect(f"{repository}:v1")
    push(model, f"{repository}:v1")


def test_a_file_that_changes_during_a_push_leaves_the_tag_as_it_was(
    repository: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = push(model, f"{repository}:v1")
    changing = sharded.copy(model, tmp_path / "changing")
    sharded.write_shard(changing / sharded.SHARDS[0], uuid.uuid4().int)
    run = buildx.run

    def change(request: buildx.BuildRequest) -> Any:
        with (changing / sharded.SHARDS[1]).open("ab") as file:  # the last file of the stream
            file.write(b"more")
        return run(request)

    monkeypatch.setattr(buildx, "run", change)
    with pytest.raises(NotReadyError, match="changed while it was pushed"):
        push(changing, f"{repository}:v1")
    assert model_image.inspect(f"{repository}:v1") == before


@pytest.mark.parametrize(
    ("status", "body", "message", "hint"),
    [
        pytest.param(500, b'{"errors": [{"message": "no space left on device"}]}', "500", "full", marks=RETRIED),
        (403, b'{"errors": [{"code": "DENIED", "message": "quota exceeded"}]}', "403|quota exceeded", "docker login"),
    ],
    ids=["full", "quota"],
)
def test_a_registry_that_refuses_a_push_leaves_no_image(
    registry: RegistryProxy, repository: str, model: Path, status: int, body: bytes, message: str, hint: str
) -> None:
    registry.fault = lambda method, _path: (status, body) if method in ("POST", "PATCH", "PUT") else None
    with pytest.raises(NotReadyError) as caught:
        push(model, f"{repository}:v1")
    assert re.search(message, caught.value.message)
    assert hint in (caught.value.hint or "")
    registry.fault = lambda _method, _path: None
    with pytest.raises(UsageError, match="not found in its registry"):
        model_image.inspect(f"{repository}:v1")
    assert push(model, f"{repository}:v1").sha256 == ModelFolder(model).digest


@RETRIED
@pytest.mark.parametrize("fault", ["lost", "changed", "cut"])
def test_a_registry_that_loses_or_changes_a_layer_leaves_no_folder(
    registry: RegistryProxy, repository: str, tmp_path: Path, fault: str
) -> None:
    image, digest, layer = put_model(repository, tmp_path / "model")
    body = {"lost": b'{"errors": [{"code": "BLOB_UNKNOWN"}]}', "changed": b"x" * len(layer), "cut": layer[:-5000]}[
        fault
    ]
    registry.fault = lambda _method, path: (404 if fault == "lost" else 200, body) if path.endswith(digest) else None
    with pytest.raises(InferctlError) as caught:
        pull(image, tmp_path / "pulled")
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    registry.fault = lambda _method, _path: None
    pull(image, tmp_path / "pulled")
    assert content(tmp_path / "pulled") == content(tmp_path / "model")


def test_an_interrupted_pull_leaves_no_folder(repository: str, tmp_path: Path) -> None:
    image, _, _ = put_model(repository, tmp_path / "model")
    interrupt(model_transfer.pull(image, tmp_path / "pulled"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_registry_that_does_not_respond_is_an_error(
    registry: RegistryProxy, repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "_REGISTRY_S", 2)
    registry.fault = lambda _method, _path: time.sleep(6)
    with pytest.raises(NotReadyError, match="did not respond within 2 s"):
        model_image.inspect(f"{repository}:v1")


def test_a_web_page_in_place_of_a_registry_is_an_error(registry: RegistryProxy, repository: str) -> None:
    registry.fault = lambda _method, _path: (200, b"<!DOCTYPE html><html><body>Sign in</body></html>")
    with pytest.raises(NotReadyError) as caught:
        model_image.inspect(f"{repository}:v1")
    assert "login page" in (caught.value.hint or "")


def layer_of(folder: Path) -> tuple[bytes, dict[str, str]]:
    """Return a layer with the model `folder`, and the labels of a push."""
    found = ModelFolder(folder)
    labels = model_image.labels_of(found, model_transfer._files(found), None, None, None)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in content(folder).items():
            info = tarfile.TarInfo(f"model/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue(), labels


def put_model(repository: str, folder: Path, **labels: str) -> tuple[ModelImage, str, bytes]:
    """Write a new model into `folder` and, without a builder, into the registry. Return its image, digest and layer."""
    layer, own = layer_of(sharded.write(folder, run=uuid.uuid4().hex))
    digest = put_image(repository, layer, own | labels)
    return model_image.inspect(f"{repository}:v1"), digest, layer


def put_image(repository: str, layer: bytes, labels: dict[str, str]) -> str:
    """Write an image into the registry as it is, whatever a builder would refuse. Return the digest of its layer."""
    host, _, name = repository.partition("/")
    connection = http.client.HTTPConnection(host, timeout=60)

    def request(method: str, path: str, body: bytes, kind: str = "application/octet-stream") -> str:
        connection.request(method, path, body, {"content-type": kind})
        response = connection.getresponse()
        assert response.status in (201, 202), response.read()
        response.read()
        return response.getheader("location") or ""

    def blob(data: bytes, kind: str) -> dict[str, Any]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        place = urllib.parse.urlsplit(request("POST", f"/v2/{name}/blobs/uploads/", b""))
        request("PUT", f"{place.path}?{place.query}&digest={digest}", data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest, "size": len(data)}

    written = blob(layer, "layer.v1.tar")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": [written["digest"]]},
    }
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": kind, "layers": [written]}
    manifest["config"] = blob(json.dumps(config).encode(), "config.v1+json")
    request("PUT", f"/v2/{name}/manifests/v1", json.dumps(manifest).encode(), kind)
    connection.close()
    return str(written["digest"])


def test_files_with_another_hash_than_that_of_the_label_are_not_kept(repository: str, tmp_path: Path) -> None:
    """What a builder lets through. test_model_images.py has names, archives and labels that are rejected before."""
    image, _, _ = put_model(repository, tmp_path / "model", **{"io.inferctl.model.sha256": "0" * 64})
    with pytest.raises(InferctlError, match="have the hash") as caught:
        pull(image, tmp_path / "pulled")
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
