"""Pushes, inspects and pulls models as images of their own, through buildx.

Such an image has no base. Each weight file is a layer, and all other files are one. Times, owners and modes are fixed,
so equal files make equal layers: a fine-tune that changes one shard uploads one layer. The labels say what the model is
and which files it has, so that `inspect` needs no weights and `pull` accepts nothing else.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import tarfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from inferctl.core.errors import InferctlError, NotReadyError, UsageError, shown
from inferctl.core.sizes import size
from inferctl.image import buildx, failures
from inferctl.image.docker import DockerEngine
from inferctl.image.events import Event, Note, Phase
from inferctl.image.image_name import split
from inferctl.image.push import PushFailedError, retrying
from inferctl.image.records import ATTEMPTS
from inferctl.image.render import EPOCH
from inferctl.models import image_source, untrusted
from inferctl.models import model as model_folder
from inferctl.models.hub import HubModel
from inferctl.models.model import ModelFolder, is_hub_id, resolve_task

# The files are the same for every platform. A builder with the classic image store pushes the first platform only.
PLATFORMS = ("linux/amd64", "linux/arm64")
_LABEL = "io.inferctl.model."
_WEIGHTS = (".safetensors", ".gguf")
# An image with the server has up to eight further layers, and overlay file systems mount at most 128.
_MAX_WEIGHT_LAYERS = 100
# A line of a Dockerfile has at most 65,535 bytes.
_MAX_LABEL_BYTES = 60_000
# Texts that a license may require next to the weights.
_DOCUMENTS = re.compile(r"README\.md|(?:LICEN[CS]E|NOTICE|COPYING)[\w.-]*", re.IGNORECASE)
_NO_MODEL = "pass the name of an image that `inferctl model push` pushed"


@dataclass(frozen=True)
class ModelImage:
    """A model in a registry. `reference` is `name@digest`, `files` maps the files of the model to their bytes.

    `sha256` is that of `ModelFolder.digest`. `layers` are digests and bytes as the registry stores them. `config` is
    the content of config.json, None if it is too large for a label.
    """

    reference: str
    sha256: str
    architecture: str
    task: str
    number_formats: str
    parameters: int
    files: Mapping[str, int]
    layers: tuple[tuple[str, int], ...]
    config: Mapping[str, Any] | None = None
    library_type: str | None = None
    quantization: str | None = None
    source: str | None = None
    revision: str | None = None
    license: str | None = None

    @property
    def bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(self.files.values())

    @property
    def digest(self) -> str:
        """Digest of the image in its registry."""
        return self.reference.partition("@")[2]

    def document(self) -> dict[str, Any]:
        """Return the model as JSON data, for `--json`."""
        found = {name: value for name, value in asdict(self).items() if name not in ("config", "library_type")}
        found["layers"] = [{"digest": digest, "bytes": bytes_} for digest, bytes_ in self.layers]
        return {**found, "source_name": f"oci://{self.reference}", "bytes": self.bytes}


def groups(files: Mapping[str, int]) -> list[list[str]]:
    """Return the files of each layer: first all that are no weights, then each weight file, sorted.

    A model with more than 100 weight files has several of them in a layer.
    """
    weights = sorted(name for name in files if name.endswith(_WEIGHTS))
    each = math.ceil(len(weights) / _MAX_WEIGHT_LAYERS) or 1
    layers = [weights[start : start + each] for start in range(0, len(weights), each)]
    return [sorted(files.keys() - set(weights)), *layers]


def labels_of(
    folder: ModelFolder, files: Mapping[str, int], source: str | None, revision: str | None, license_id: str | None
) -> dict[str, str]:
    """Return the labels of the image of `folder`. They do not depend on the machine, the time or the folder's name.

    Raises `UsageError` for a model that no task computes, and if the names of the files are too long for a label.
    """
    parameters, formats = folder.parameters, sorted(set(folder.number_formats.values()))
    quantization = folder.config.get("quantization_config")
    own = {
        "sha256": folder.digest,
        "architecture": folder.architecture,
        "task": resolve_task("auto", folder, source or str(folder.path)),
        "number_formats": ",".join(formats),
        "parameters": str(parameters),
        "files": _compact(dict(sorted(files.items()))),
        "library_type": folder.library_type,
        "quantization": str(quantization.get("quant_method")) if isinstance(quantization, Mapping) else None,
        "config": _compact(folder.config),
    }
    found = {f"{_LABEL}{name}": value for name, value in own.items() if value}
    found |= {
        f"org.opencontainers.image.{name}": value
        for name, value in {"source": source, "revision": revision, "licenses": license_id}.items()
        if value
    }
    if len(found[f"{_LABEL}config"]) > _MAX_LABEL_BYTES:  # labels of a classifier
        del found[f"{_LABEL}config"]
    if too_long := [name for name, value in found.items() if len(_quoted(value)) > _MAX_LABEL_BYTES]:
        raise UsageError(
            f"{folder.path} has {len(files)} files, whose names are too long for the label {too_long[0]}",
            "merge the shards of the weights into fewer files",
        )
    return found


def dockerfile(labels: Mapping[str, str], layers: int) -> str:
    """Return the Dockerfile of a context with the folders `0` to `layers - 1`, one for each layer."""
    copies = [f"COPY --link {number} /" for number in range(layers)]
    named = [f"LABEL {name}={_quoted(value)}" for name, value in sorted(labels.items())]
    return "\n".join(["FROM scratch", *copies, *named]) + "\n"


def push(
    folder: ModelFolder, source: str, reference: str, license_id: str | None = None, attempts: int = ATTEMPTS
) -> Generator[Event, None, ModelImage]:
    """Push the model `folder`, which was found as `source`, and return what the registry then has as `reference`.

    The files are streamed to the builder: nothing is copied on this side. Raises `UsageError` for a folder that is no
    model, `NotReadyError` without a Docker Engine, and the errors of `failures.push_error`.
    """
    hub_id = source if is_hub_id(source) else None
    revision = folder.path.name if hub_id and re.fullmatch(r"[0-9a-f]{40}", folder.path.name) else None
    files = _files(folder)
    labels = labels_of(folder, files, hub_id, revision, license_id or _license(folder.path))
    layers = [layer for layer in groups(files) if layer]
    text = dockerfile(labels, len(layers))
    engine = DockerEngine.connect()
    builder = buildx.detect(engine.info().containerd_store)
    output = f"type=image,name={reference},push=true"
    request = buildx.BuildRequest(
        send=lambda stream: _write_context(stream, folder.path, text, layers),
        build_args={"SOURCE_DATE_EPOCH": str(EPOCH)},
        platforms=PLATFORMS if builder.exports else PLATFORMS[:1],
        outputs=(f"{output},compression=uncompressed,force-compression=true,oci-mediatypes=true",)
        if builder.exports
        else (output,),
        annotations={
            f"index,manifest:{name}": value
            for name, value in labels.items()
            if builder.exports and name.startswith("org.opencontainers.")
        },
    )
    yield Phase("push", f"{size(sum(files.values()))} in {len(layers)} layers to {reference}")
    if not builder.exports:
        yield Note("the layers are compressed with gzip, for linux/amd64: " + builder.describe())

    def attempt() -> Generator[Event, None, dict[str, Any]]:
        try:
            return (yield from buildx.run(request))
        except buildx.BuildFailedError as error:
            raise PushFailedError(failures.last_line(error.text)) from None

    try:
        metadata = yield from retrying(attempt, reference, attempts)
    finally:
        engine.untag(reference)  # buildx names the image in the engine, too
    found = inspect(f"{split(reference)[0]}@{metadata['containerimage.digest']}")
    if found.sha256 != labels[f"{_LABEL}sha256"] or found.files != files:
        raise InferctlError(
            f"{found.reference} in the registry is not the model that was pushed",
            "push again; another process may have pushed the same name at the same time",
        )
    return found


def inspect(source: str) -> ModelImage:
    """Return what the registry has as `source`, an image with or without `oci://`, from its labels.

    Raises `UsageError` if there is no such image or it is no model, `NotReadyError` if the registry does not respond.
    """
    reference = image_source.reference(source)
    name = split(reference)[0]
    digest = image_source.digest(reference) or buildx.digest(reference)
    found = buildx.remote_image(f"{name}@{digest}", PLATFORMS[0])
    return read(f"{name}@{digest}", found.labels, found.layers)


def read(reference: str, labels: Mapping[str, str], layers: Sequence[tuple[str, int]]) -> ModelImage:
    """Return the model that `labels` describe. Others wrote them. Raises `UsageError` if they describe none."""

    def label(name: str) -> str:
        return str(labels.get(f"{_LABEL}{name}") or "")

    try:
        files = json.loads(label("files"))
        if not files or not all(type(bytes_) is int and bytes_ >= 0 for bytes_ in files.values()):
            raise ValueError
        config = json.loads(label("config") or "null")
        if not isinstance(config, dict | None) or not re.fullmatch(r"[0-9a-f]{64}", label("sha256")):
            raise ValueError
        parameters = int(label("parameters"))
    except (ValueError, AttributeError, RecursionError):
        raise UsageError(f"{reference} is not a model image: it has no valid labels {_LABEL}*", _NO_MODEL) from None
    image_source.check_names(files, reference)
    return ModelImage(
        reference=reference,
        sha256=label("sha256"),
        architecture=label("architecture"),
        task=label("task"),
        number_formats=label("number_formats"),
        parameters=parameters,
        files=files,
        layers=tuple(layers),
        config=config,
        library_type=label("library_type") or None,
        quantization=label("quantization") or None,
        source=labels.get("org.opencontainers.image.source"),
        revision=labels.get("org.opencontainers.image.revision"),
        license=labels.get("org.opencontainers.image.licenses"),
    )


def facts(source: str) -> HubModel:
    """Return the facts about a model image from its registry, without its weights. Raises the errors of `inspect`."""
    found = inspect(source)
    if found.config is None:
        raise NotReadyError(f"the labels of {source} lack config.json", f"run `inferctl model pull {source}`")
    return HubModel(found.digest, found.config, found.parameters, found.files, found.library_type)


def fetch(source: str) -> Generator[Event, None, ModelFolder]:
    """Return the folder of `source` in the cache, pulled if it is not there. Raises the errors of `pull`."""
    found = inspect(source)
    folder = image_source.cache_folder(found.digest)
    if not folder.is_dir():
        yield from pull(found, folder)
    if image_source.digest(source) is None:
        image_source.remember(source, found.digest)
    return model_folder.find(source)


def pull(image: ModelImage, target: Path) -> Generator[Event, None, Path]:
    """Write the files of `image` to the new folder `target`, and return it.

    It gets its name when all files are complete and have the hash of the label. Raises `NotReadyError` if the registry,
    the Docker Engine or the disk fails, `UsageError` for an image with other files than its labels say.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    if (free := shutil.disk_usage(target.parent).free) < image.bytes:
        raise NotReadyError(
            f"{image.reference} has {size(image.bytes)}, but {target.parent} has {size(free)} free", "free disk space"
        )
    DockerEngine.connect()
    buildx.detect(containerd_store=False)
    # A name that is no local tag: the builder always asks the registry.
    text = f"FROM --platform={PLATFORMS[0]} {image.reference}\n"
    request = buildx.BuildRequest(
        send=lambda stream: _write_context(stream, Path(), text, []),
        receive=lambda stream: _extract(stream, image, partial),
        outputs=("type=tar,dest=-",),
    )
    yield Phase("pull", f"{size(image.bytes)} of {image.reference}")
    try:
        try:
            partial.mkdir()
            yield from buildx.run(request)
        except buildx.BuildFailedError as error:
            raise failures.pull_error(failures.last_line(error.text), image.reference) from None
        if (found := ModelFolder(partial).digest) != image.sha256:
            raise InferctlError(
                f"the files of {image.reference} have the hash {found}, but its label says {image.sha256}",
                "do not use this image; push the model again",
            )
        with suppress(OSError):
            target.rmdir()  # an empty folder
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            # Another process pulled the same image into the cache.
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _files(folder: ModelFolder) -> dict[str, int]:
    """Return the bytes of the files to push by name. Raises `UsageError` for links out of the folder, devices, ..."""
    documents = [file for file in folder.path.iterdir() if _DOCUMENTS.fullmatch(file.name) and not file.is_dir()]
    untrusted.check(folder.path, documents)
    found = dict.fromkeys([*folder.files(), *documents])
    files = {file.relative_to(folder.path).as_posix(): file.stat().st_size for file in found}
    image_source.check_names(files, str(folder.path))
    return files


def _license(folder: Path) -> str | None:
    """Return the license in the head of the model card, None without one."""
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        with (folder / "README.md").open(encoding="utf-8") as stream:
            text = stream.read(65_536)
        if head := re.match(r"---\n(.*?)\n---\n", text, re.DOTALL):
            found = yaml.safe_load(head[1])
            if isinstance(found, dict) and isinstance(found.get("license"), str):
                return str(found["license"])
    return None


def _write_context(stream: IO[bytes], folder: Path, text: str, layers: Sequence[Sequence[str]]) -> None:
    """Write a build context with the Dockerfile `text` and a folder for each layer as a tar stream."""
    with (
        _translated(f"{folder} changed while it was pushed"),
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as archive,
    ):
        archive.addfile(_entry("Dockerfile", len(text.encode())), io.BytesIO(text.encode()))
        for number, names in enumerate(layers):
            written: set[str] = set()
            for name in names:
                parts = f"{image_source.FOLDER}/{name}".split("/")
                for end in range(1, len(parts)):
                    if (parent := "/".join(parts[:end])) not in written:
                        archive.addfile(_entry(f"{number}/{parent}"))
                        written.add(parent)
                with (folder / name).open("rb") as file:
                    archive.addfile(_entry(f"{number}/{'/'.join(parts)}", os.fstat(file.fileno()).st_size), file)


def _entry(name: str, bytes_: int | None = None) -> tarfile.TarInfo:
    """Return the entry of a file with `bytes_` bytes, or of a folder."""
    found = tarfile.TarInfo(name)
    found.type = tarfile.DIRTYPE if bytes_ is None else tarfile.REGTYPE
    found.size, found.mtime, found.mode = bytes_ or 0, EPOCH, 0o755 if bytes_ is None else 0o644
    return found


def _extract(stream: IO[bytes], image: ModelImage, target: Path) -> None:
    """Write the files of a tar stream to `target`: exactly those of the label, and nothing that is not a file.

    `image.files` are checked names, so no path leads out of `target`, through a link or otherwise.
    """
    missing = {f"{image_source.FOLDER}/{name}": bytes_ for name, bytes_ in image.files.items()}
    folders = {"/".join(name.split("/")[:end]) for name in missing for end in range(name.count("/") + 1)} | {"."}
    with (
        _translated(f"{image.reference} cannot be written to {target.parent}"),
        tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as archive,
    ):
        for member in archive:
            name = member.name.removeprefix("./").rstrip("/")
            if member.isdir() and name in folders:
                continue
            content = archive.extractfile(member) if member.isreg() and missing.get(name) == member.size else None
            if content is None:
                kind = "file" if member.isreg() else "folder" if member.isdir() else "link or device"
                raise UsageError(
                    f"{image.reference} has the {kind} {shown(name)}, which its labels do not list", _NO_MODEL
                )
            del missing[name]
            path = target / name.partition("/")[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
    if missing:
        raise UsageError(f"{image.reference} lacks {shown(min(missing))}, which its labels list", _NO_MODEL)


@contextmanager
def _translated(message: str) -> Generator[None, None, None]:
    """Convert an error of a file to an `InferctlError`. One of the pipe to buildx stays: buildx says why it ended."""
    try:
        with failures.raising_disk_full():
            yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NotReadyError(f"{message}: {error.strerror or error}", "check the folder, and try again") from None


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def _quoted(value: str) -> str:
    """Return a label's value as a Dockerfile accepts it."""
    return '"' + re.sub(r'([\\"$])', r"\\\1", " ".join(value.splitlines())) + '"'
