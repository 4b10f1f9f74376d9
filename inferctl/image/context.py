"""A build context on disk, gone when the build is over."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from inferctl.errors import InferctlError
from inferctl.image.failures import telling_disk_full
from inferctl.model import ModelFolder

if TYPE_CHECKING:
    from inferctl.render import Rendered

# BuildKit sends only what changed since the last build of a context of the same base name, a folder of wheels beside it included.
# It compares sizes and times, so times must stay those of the writing: the Dockerfile sets the ones that a layer carries.
_NAME = "inferctl"


@contextmanager
def staged(rendered: Rendered, server: Mapping[str, Path]) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder to build from, and the named contexts: name -> folder.

    The folder has the Dockerfile, .dockerignore, `rendered.files` and the `server` files (context path -> file on disk).
    Raises `NotReadyError` when the disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="inferctl-context-") as name:
        with telling_disk_full():
            folder, contexts = _write(Path(name), rendered, server)
        yield folder, contexts


def _write(room: Path, rendered: Rendered, server: Mapping[str, Path]) -> tuple[Path, dict[str, str]]:
    folder = room / _NAME
    folder.mkdir()
    texts = {
        "Dockerfile": rendered.dockerfile.encode(),
        ".dockerignore": rendered.dockerignore.encode(),
        **rendered.files,
    }
    for path, content in sorted(texts.items()):
        _inside(folder, path).write_bytes(content)
    for path, file in sorted(server.items()):
        shutil.copyfile(file, _inside(folder, path))
    contexts = dict(rendered.contexts)
    if "model" in contexts:
        contexts["model"] = str(_followed(Path(contexts["model"]), room / "model"))
    return folder, contexts


def _followed(source: Path, target: Path) -> Path:
    """`source`, or, when it holds links (a hub cache's snapshot does, out of the folder), `target` with what they lead to."""
    files = ModelFolder(source).files()
    if not any(file.is_symlink() for file in files):
        return source
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), place)
        except OSError:
            # Another file system, or one without hard links.
            shutil.copyfile(file, place)
    return target


def _inside(folder: Path, path: str) -> Path:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise InferctlError(
            f"{path!r} is not a path inside the build context", "this is a bug in the renderer: please report it"
        )
    target = folder.joinpath(*parts.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
