"""Writes a temporary build context."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from inferctl.core.partials import partial_folder
from inferctl.image.failures import raising_disk_full
from inferctl.image.render import Rendered
from inferctl.models.model import ModelFolder

# For a context with the same base name as an earlier one, BuildKit sends only the changed files, also of named contexts
# such as a wheel folder. It compares sizes and modification times, so files keep the time when they were written. The
# Dockerfile sets the times in the layers.
_NAME = "inferctl"


@contextmanager
def staged(rendered: Rendered, server: Mapping[str, Path]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Write a build context and return its folder and the named contexts (name -> folder). Remove it at the end.

    The folder has the Dockerfile, .dockerignore, `rendered.files` and the `server` files (context path -> local file).
    Raises `NotReadyError` if the disk is full.
    """
    with partial_folder(Path(tempfile.gettempdir()) / "inferctl-context", 0o700) as parent:
        with raising_disk_full():
            folder, contexts = _write(parent, rendered, server)
        yield folder, contexts


def _write(parent: Path, rendered: Rendered, server: Mapping[str, Path]) -> tuple[Path, dict[str, str]]:
    folder = parent / _NAME
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
    contexts = {
        name: source if name == "wheels" else str(_without_links(Path(source), parent / name))
        for name, source in rendered.contexts.items()
    }
    return folder, contexts


def _without_links(source: Path, target: Path) -> Path:
    """Return `source`, or if it contains symbolic links, `target` with the files that they point to.

    A snapshot in a hub cache has links to files outside of its folder.
    """
    files = ModelFolder(source).files()
    if not any(file.is_symlink() for file in files):
        return source
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), copy)
        except OSError:
            # The target is on another file system, or the file system has no hard links.
            shutil.copyfile(file, copy)
    return target


def _inside(folder: Path, path: str) -> Path:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
