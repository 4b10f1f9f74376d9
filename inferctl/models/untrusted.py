"""Reads the files of a model folder, which others wrote: at most a number of bytes, and nothing outside of the folder.

A snapshot in a hub's cache has links to `models--ORG--NAME/blobs`. Links to blobs are the only ones that may leave the
folder. Another one could put a private file of this machine into an image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from inferctl.core.errors import UsageError, shown
from inferctl.core.sizes import size

# The largest published index of shards has 21 MB, and the largest config.json 2 MB (its labels).
_MAX_JSON_BYTES, _MAX_INDEX_BYTES = 16 * 2**20, 100 * 2**20
# Tokenizers and vocabularies. The largest published tokenizer.json has 35 MB.
_MAX_OTHER_BYTES = 256 * 2**20
_WEIGHTS = frozenset({".safetensors", ".gguf", ".bin"})
_AGAIN = "the download may be incomplete: download the model again"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises `UsageError` if it cannot be read or is too large."""
    limit = _MAX_INDEX_BYTES if path.name.endswith((".index.json", "tokenizer.json")) else _MAX_JSON_BYTES
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise _too_large(path, limit)
        return json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}", _AGAIN) from None


def inside(folder: Path, name: object) -> Path:
    """Return the path `name`, which a file of the model contains, in `folder`.

    Raises `UsageError` if it is no relative path, or leads out of the folder, also through a link.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) and "\0" not in name else ("..",)
    if ".." in parts or parts[:1] == ("/",) or not _stays(path := folder.joinpath(*parts), folder.resolve()):
        raise UsageError(
            f"{folder} is not accepted: a file of the model names {shown(name)}, which is outside of the folder",
            "do not use this folder unless you trust who made it; download the model again",
        )
    return path


def check(folder: Path, files: Iterable[Path]) -> None:
    """Raise `UsageError` if one of the `files` of a model leads out of `folder` or is larger than any published one.

    Also for devices and pipes, which would end the reader's memory or its patience.
    """
    root = folder.resolve()
    for file in files:
        if file.is_symlink() and not _stays(file, root):
            raise UsageError(
                f"{file} is a link to {shown(str(file.readlink()))}, outside of the model folder",
                "replace the link by a copy of the file, if you trust who made this folder",
            )
        if not file.is_file():
            raise UsageError(f"{file} is not a file, but a device, a pipe or a socket", "download the model again")
        if file.suffix not in _WEIGHTS and file.stat().st_size > _MAX_OTHER_BYTES:
            raise _too_large(file, _MAX_OTHER_BYTES)


def is_blob(file: Path) -> bool:
    """Return whether a file, with its links followed, is in a hub's cache, where the name is a hash of the content."""
    blobs = Path(os.path.realpath(file)).parent
    return blobs.name == "blobs" and blobs.parent.name.startswith("models--")


def _stays(path: Path, root: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root) or is_blob(path)


def _too_large(path: Path, limit: int) -> UsageError:
    return UsageError(f"{path} is larger than {size(limit)}, so it is not read", "download the model again")
