"""A build context on disk, equal to the byte for equal input, and gone when the build is over."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from inferctl.errors import InferctlError
from inferctl.render import EPOCH

if TYPE_CHECKING:
    from inferctl.render import Rendered

_FILE_MODE, _FOLDER_MODE = 0o644, 0o755


@contextmanager
def staged(rendered: Rendered, server: Mapping[str, Path]) -> Iterator[Path]:
    """The folder to build from: Dockerfile, .dockerignore, `rendered.files` and the `server` files (context path -> file on disk)."""
    with tempfile.TemporaryDirectory(prefix="inferctl-context-") as name:
        folder = Path(name)
        texts = {
            "Dockerfile": rendered.dockerfile.encode(),
            ".dockerignore": rendered.dockerignore.encode(),
            **rendered.files,
        }
        for path, content in sorted(texts.items()):
            _inside(folder, path).write_bytes(content)
        for path, file in sorted(server.items()):
            shutil.copyfile(file, _inside(folder, path))
        _normalise(folder)
        yield folder


def _inside(folder: Path, path: str) -> Path:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise InferctlError(
            f"{path!r} is not a path inside the build context", "this is a bug in the renderer: please report it"
        )
    target = folder.joinpath(*parts.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _normalise(folder: Path) -> None:
    # Depth first: setting a file's time touches nothing, but making it did touch its folder.
    for parent, folders, files in os.walk(folder, topdown=False):
        for names, mode in ((files, _FILE_MODE), (folders, _FOLDER_MODE)):
            for name in names:
                path = Path(parent) / name
                path.chmod(mode)
                os.utime(path, (EPOCH, EPOCH))
    folder.chmod(_FOLDER_MODE)
    os.utime(folder, (EPOCH, EPOCH))
