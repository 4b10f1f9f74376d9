"""Finds wasted bytes in an image: files that a later layer overwrites or deletes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Literal

from inferctl.core.errors import InferctlError

# Before Python 3.14, tarfile does not read zstd.
if sys.version_info >= (3, 14):
    import tarfile
else:
    from backports.zstd import tarfile

_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
# Larger entries of the archive are layers, not JSON.
_MAX_JSON_BYTES = 4_000_000


@dataclass(frozen=True)
class HiddenFile:
    """A file in a layer that is not visible in the image. `layer` counts from 0 at the bottom."""

    path: str
    bytes: int
    layer: int
    how: Literal["overwritten", "deleted"]


@dataclass(frozen=True)
class Waste:
    """`bytes` of `total` (uncompressed file bytes of all layers) are hidden. `files` are sorted, largest first."""

    bytes: int
    total: int
    files: tuple[HiddenFile, ...]


def analyze(archive: Iterable[bytes]) -> Waste:
    """Return the hidden bytes of an image archive from `docker save`. Reads each byte once and writes no files."""
    tables: dict[str, dict[str, int]] = {}
    documents: dict[str, bytes] = {}
    with tarfile.open(fileobj=_Stream(archive), mode="r|") as outer:
        for member in outer:
            content = outer.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            head = content.read(_MAX_JSON_BYTES) if member.size <= _MAX_JSON_BYTES else b""
            if head[:1] in (b"{", b"["):
                documents[member.name] = head
                continue
            tables[member.name] = dict(_entries(io.BytesIO(head) if member.size <= _MAX_JSON_BYTES else content))
    try:
        order = [str(name) for name in json.loads(documents["manifest.json"])[0]["Layers"]]
        return overlay([tables[name] for name in order])
    except (KeyError, IndexError, ValueError) as error:
        raise InferctlError(
            f"cannot read the image archive: {error}", "pass `--no-lint` to skip the analysis of layers"
        ) from None


def overlay(layers: list[dict[str, int]]) -> Waste:
    """Return the files of `layers` that later layers hide.

    Each layer maps paths to bytes, bottom layer first, with whiteouts as in the OCI image format.
    """
    seen: dict[str, tuple[int, int]] = {}
    hidden: list[HiddenFile] = []

    def hide(path: str, how: Literal["overwritten", "deleted"]) -> None:
        size, layer = seen.pop(path)
        if size:
            hidden.append(HiddenFile(f"/{path}", size, layer, how))

    for index, entries in enumerate(layers):
        for path in entries:
            folder, _, name = path.rpartition("/")
            if name == _OPAQUE:
                for below in [p for p in seen if p.startswith(f"{folder}/")]:
                    hide(below, "deleted")
            elif name.startswith(_WHITEOUT):
                deleted = f"{folder}/{name[len(_WHITEOUT) :]}" if folder else name[len(_WHITEOUT) :]
                for below in [p for p in seen if p == deleted or p.startswith(f"{deleted}/")]:
                    hide(below, "deleted")
        for path, size in entries.items():
            if path.rpartition("/")[2].startswith(_WHITEOUT):
                continue
            if path in seen:
                hide(path, "overwritten")
            seen[path] = (size, index)
    total = sum(sum(entries.values()) for entries in layers)
    files = tuple(sorted(hidden, key=lambda file: (-file.bytes, file.path)))
    return Waste(sum(file.bytes for file in files), total, files)


def _entries(content: IO[bytes]) -> Iterator[tuple[str, int]]:
    try:
        with tarfile.open(fileobj=content, mode="r|*") as layer:
            for member in layer:
                # Directories are in every layer that changes their content, and have no size.
                if not member.isdir():
                    yield member.name.removeprefix("./").lstrip("/"), member.size if member.isfile() else 0
    except tarfile.ReadError:
        return


class _Stream(io.RawIOBase):
    """A file that reads from an iterator of chunks, forward only."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        wanted = -1 if size is None else size
        parts, available = [self._rest], len(self._rest)
        while wanted < 0 or available < wanted:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            parts.append(chunk)
            available += len(chunk)
        data = b"".join(parts)
        self._rest = data[wanted:] if 0 <= wanted < len(data) else b""
        return data[:wanted] if wanted >= 0 else data
