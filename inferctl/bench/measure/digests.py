"""sha256 digests (hex) of files that figures depend on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from inferctl.bench.load import records


def of_file(path: Path) -> str:
    """Return the digest of one file. Raises `OSError`."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def of_records(folder: Path) -> dict[str, str]:
    """Return the digest of each records file in `folder`, by file name."""
    return {file.name: of_file(file) for file in (*records.files(folder), *records.event_files(folder))}
