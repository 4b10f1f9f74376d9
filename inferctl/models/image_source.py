"""Names of models in images (`oci://REFERENCE`), the cache with their files, and which file names are accepted.

`image/model_image.py` pushes and pulls the images. This module needs neither Docker nor a network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from inferctl.config.spec_types import IMAGE_REFERENCE, IMAGE_SCHEME
from inferctl.core import outputs
from inferctl.core.errors import UsageError, shown

# The folder of the model in its image. An image with the server has its weights there too, so layers can be equal.
FOLDER = "model"
# For labels of others. A push has less room: one label has all names and sizes (`image/model_image.py`).
_MAX_FILES = 2000
_MAX_NAME_BYTES = 255


def is_image(source: str) -> bool:
    """Return whether `source` names a model in an image."""
    return source.startswith(IMAGE_SCHEME)


def reference(source: str) -> str:
    """Return the image of `source`, which may lack `oci://`. Raises `UsageError` if it is no image name.

    The tag is `latest` if there is neither tag nor digest.
    """
    found = source.removeprefix(IMAGE_SCHEME)
    if not re.fullmatch(IMAGE_REFERENCE, found):
        raise UsageError(
            f"{shown(source)} is not the name of an image",
            "pass oci://registry/team/model@sha256:... with 64 hexadecimal digits, or a tag in place of the digest",
        )
    return found if "@" in found or ":" in found.rpartition("/")[2] else f"{found}:latest"


def digest(source: str) -> str | None:
    """Return the digest in the name of `source` (`sha256:...`), None without one."""
    return source.partition("@")[2] or None


def cache_folder(digest: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder for the files of the image with `digest`, next to the cache of the hub."""
    return _home(environment) / digest.partition(":")[2]


def remember(source: str, digest: str, environment: Mapping[str, str] = os.environ) -> None:
    """Store the digest of a tag, so that `cached` finds its files without the registry."""
    file = _tag_file(source, environment)
    file.parent.mkdir(parents=True, exist_ok=True)
    outputs.replace(file, digest)


def cached(source: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder with the files of `source` in the cache; None if they were not pulled."""
    known = digest(reference(source))
    if known is None:
        file = _tag_file(source, environment)
        known = file.read_text(encoding="utf-8").strip() if file.is_file() else None
    if known is None or not re.fullmatch(r"sha256:[0-9a-f]{64}", known):
        return None
    folder = cache_folder(known, environment)
    return folder if folder.is_dir() else None


def check_names(names: Iterable[str], whose: str) -> None:
    """Raise `UsageError` if a file system could write `names`, relative to a folder, outside of it or over each other.

    `whose`: the folder or the image with the files, for the error.
    """
    names = list(dict.fromkeys(names))
    hint = "push only models that you trust; rename the file, or download the model again"
    if len(names) > _MAX_FILES:
        raise UsageError(f"{whose} has {len(names)} files; a model image has at most {_MAX_FILES}", hint)
    known: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        if (
            not name.isprintable()
            or any(part in ("", ".", "..") or len(part.encode()) > _MAX_NAME_BYTES for part in parts)
            or re.search(r'[\\:*?"<>|]', name)
        ):
            raise UsageError(f"{whose} has a file with the name {shown(name)}, which is not accepted", hint)
        # Also the folders: `a` and `A/b` cannot both exist where case does not count.
        for end in range(1, len(parts) + 1):
            path = "/".join(parts[:end])
            kind = path if end < len(parts) else f"{path}\0"
            if known.setdefault(path.casefold(), kind) != kind:
                other = known[path.casefold()].rstrip("\0")
                raise UsageError(
                    f"{whose} has {shown(name)} and {shown(other)}, which are one file on some file systems", hint
                )


def _home(environment: Mapping[str, str]) -> Path:
    # The same variables as in `model.py`, which finds the hub's cache.
    caches = environment.get("XDG_CACHE_HOME", "~/.cache")
    return Path(environment.get("HF_HOME", f"{caches}/huggingface")).expanduser() / "model-images"


def _tag_file(source: str, environment: Mapping[str, str]) -> Path:
    return _home(environment) / "tags" / quote(reference(source), safe="")
