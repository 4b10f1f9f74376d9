"""Pushes models as images of their own, and pulls them, through buildx.

files -> tar stream -> builder -> registry        registry -> builder -> tar stream -> files, checked
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from inferctl.config.spec import IMAGE_SCHEME
from inferctl.core.errors import InferctlError, NotReadyError, UsageError, shown
from inferctl.core.partials import complete, partial_folder
from inferctl.core.sizes import size
from inferctl.image import buildx, failures
from inferctl.image.docker import DockerEngine
from inferctl.image.events import Event, Note, Phase
from inferctl.image.image_name import split
from inferctl.image.model_image import LABEL, NO_MODEL, PLATFORM, ModelImage, groups, inspect, labels_of, quoted
from inferctl.image.push import PushFailedError, retrying
from inferctl.image.push import push as engine_push
from inferctl.image.records import ATTEMPTS
from inferctl.image.render import EPOCH
from inferctl.models import image_source, untrusted
from inferctl.models.model import ModelFolder, is_hub_id

# Texts that a license may require next to the weights.
_DOCUMENTS = re.compile(r"README\.md|(?:LICEN[CS]E|NOTICE|COPYING)[\w.-]*", re.IGNORECASE)


def dockerfile(labels: Mapping[str, str], layers: int) -> str:
    """Return the Dockerfile of a context with the folders `0` to `layers - 1`, one for each layer."""
    copies = [f"COPY --link {number} /" for number in range(layers)]
    named = [f"LABEL {name}={quoted(value)}" for name, value in sorted(labels.items())]
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
    license_id = license_id or _license(folder.path)
    if image_source.is_image(source):  # a copy has the same digest
        origin = inspect(source)
        hub_id, revision, license_id = origin.source, origin.revision, origin.license
    labels = labels_of(folder, files, hub_id, revision, license_id)
    layers = [{name: files[name] for name in layer} for layer in groups(files)]
    text = dockerfile(labels, len(layers))
    engine = DockerEngine.connect()
    builder = buildx.detect(engine.info().containerd_store)
    output = f"type=image,name={reference}"
    request = buildx.BuildRequest(
        send=lambda stream: _write_context(stream, folder.path, text, layers),
        build_args={"SOURCE_DATE_EPOCH": str(EPOCH)},
        platform=PLATFORM,
        outputs=(f"{output},push=true,compression=uncompressed,force-compression=true,oci-mediatypes=true",)
        if builder.exports
        else (output,),
        # Those of ModelPack (`org.cncf.model.*`) are for layers, and no builder sets them.
        annotations=tuple(
            f"manifest:{name}={value}"
            for name, value in labels.items()
            if builder.exports and name.startswith("org.opencontainers.")
        ),
    )
    yield Phase("push", f"{size(sum(files.values()))} in {len(layers)} layers to {reference}")
    if not builder.exports:
        yield Note("the layers are compressed with gzip, which costs time: " + builder.describe())

    def attempt() -> Generator[Event, None, str]:
        try:
            return str((yield from buildx.run(request)).get("containerimage.digest"))
        except buildx.BuildFailedError as error:
            raise PushFailedError(failures.last_line(error.text)) from None

    try:
        digest = yield from retrying(attempt, reference, attempts if builder.exports else 1)
        if not builder.exports:
            digest = yield from engine_push(reference)
    finally:
        engine.untag(reference)  # buildx names the image in the engine, too
    found = inspect(f"{split(reference)[0]}@{digest}")
    if found.sha256 != labels[f"{LABEL}sha256"] or found.files != files:
        raise InferctlError(
            f"{found.reference} in the registry is not the model that was pushed",
            "push again; another process may have pushed the same name at the same time",
        )
    return found


def fetch(source: str) -> Generator[Event, None, Path]:
    """Return the folder of `source`, with or without `oci://`, in the cache, pulled if it is not there.

    Asks the registry for the digest of a tag. Raises the errors of `pull`.
    """
    source = f"{IMAGE_SCHEME}{image_source.reference(source)}"
    found = inspect(source)
    folder = image_source.cache_folder(found.digest)
    if not folder.is_dir():
        yield from pull(found, folder)
    if image_source.digest(source) is None:
        with _translated(f"the cache {folder.parent} cannot be written"):
            image_source.remember(source, found.digest)
    return folder


def pull(image: ModelImage, target: Path) -> Generator[Event, None, Path]:
    """Write the files of `image` to the new folder `target`, and return it.

    It gets its name when all files are complete and have the hash of the label. Raises `NotReadyError` if the registry,
    the Docker Engine or the disk fails, `UsageError` for an image with other files than its labels say.
    """
    with ExitStack() as stack:
        with _translated(f"{target} cannot be written"):
            partial = stack.enter_context(partial_folder(target))
        yield from _pull(image, target, partial)
        with _translated(f"{target} cannot be written"):
            # Another process may have pulled the same image into the cache.
            if not complete(partial, target) and target != image_source.cache_folder(image.digest):
                raise UsageError(f"{target} already exists", "name a new folder with `--output`")
    return target


def _pull(image: ModelImage, target: Path, partial: Path) -> Generator[Event, None, None]:
    """Write the files of `image` to the folder `partial`, and compare their hash with the label."""
    if (free := shutil.disk_usage(target.parent).free) < image.bytes:
        raise NotReadyError(
            f"{image.reference} has {size(image.bytes)}, but {target.parent} has {size(free)} free", "free disk space"
        )
    DockerEngine.connect()
    buildx.detect(containerd_store=False)
    # A name that is no local tag: the builder always asks the registry.
    text = f"FROM --platform={PLATFORM} {image.reference}\n"
    request = buildx.BuildRequest(
        send=lambda stream: _write_context(stream, Path(), text, []),
        receive=lambda stream: _extract(stream, image, partial),
        outputs=("type=tar,dest=-",),
    )
    yield Phase("pull", f"{size(image.bytes)} of {image.reference}")
    try:
        yield from buildx.run(request)
    except buildx.BuildFailedError as error:
        raise failures.pull_error(failures.last_line(error.text), image.reference) from None
    if (found := ModelFolder(partial).digest) != image.sha256:
        raise InferctlError(
            f"the files of {image.reference} have the hash {found}, but its label says {image.sha256}",
            "do not use this image; push the model again",
        )


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
    with suppress(OSError, ValueError):
        with (folder / "README.md").open(encoding="utf-8") as stream:
            head = re.match(r"---\n(.*?\n)---\n", stream.read(65_536), re.DOTALL)
        if head and (found := re.search(r"^license: *[\"']?([\w.+-]+)[\"']? *$", head[1], re.MULTILINE)):
            return found[1]
    return None


def _write_context(stream: IO[bytes], folder: Path, text: str, layers: Sequence[Mapping[str, int]]) -> None:
    """Write a build context as a tar stream: the Dockerfile `text`, and a folder for each layer.

    A layer has the bytes of its files by name. Raises `NotReadyError` if a file of `folder` no longer has as many.
    """
    with (
        _translated(f"{folder} changed while it was pushed"),
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as archive,
    ):
        for number, names in enumerate(layers):
            written: set[str] = set()
            for name, bytes_ in names.items():
                parts = f"{image_source.FOLDER}/{name}".split("/")
                for end in range(1, len(parts)):
                    if (parent := "/".join(parts[:end])) not in written:
                        archive.addfile(_entry(f"{number}/{parent}"))
                        written.add(parent)
                with (folder / name).open("rb") as file:
                    if os.fstat(file.fileno()).st_size != bytes_:
                        raise OSError(f"{name} has another size")
                    archive.addfile(_entry(f"{number}/{'/'.join(parts)}", bytes_), file)
        # Last, so that a stream that ends early builds no image.
        archive.addfile(_entry("Dockerfile", len(text.encode())), io.BytesIO(text.encode()))


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
                size_of = f" with {member.size} bytes" if member.isreg() else ""
                raise UsageError(
                    f"{image.reference} has the {kind} {shown(name)}{size_of}, which its labels do not list", NO_MODEL
                )
            del missing[name]
            path = target / name.partition("/")[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
    if missing:
        raise UsageError(f"{image.reference} lacks {shown(min(missing))}, which its labels list", NO_MODEL)


@contextmanager
def _translated(message: str) -> Generator[None, None, None]:
    """Convert an error of a file to an `InferctlError`. One of the pipe to buildx stays: buildx says why it ended."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NotReadyError(
            f"{message}: {error.strerror or error}", "check the folder and its free space, and try again"
        ) from None
