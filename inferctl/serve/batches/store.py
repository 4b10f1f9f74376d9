"""Files and batches on disk: a folder for each owner, with a JSON document for each of them, and contents.

    <folder>/<owner>/file-<id>, file-<id>.json      a content, and what the API says of it
    <folder>/<owner>/batch_<id>.json, .cancel       what the API says of a batch; it was cancelled
    <folder>/<owner>.batch_<id>                     the batch is not at its end

Each document is replaced as a whole, when all before it is on disk. The API writes that of a batch once, then the
worker only. So there is nothing to lock, and each process may be killed at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from inferctl.core import outputs

DAY_S = 86_400
KEPT_S = 30 * DAY_S  # files without another time, and what is known of a batch
OPEN = ("validating", "in_progress")
_MAX_ENTRIES = 20_000  # of one owner; a file has two, a batch with its outputs five
_ID = re.compile(r"(file-|batch_)[0-9a-f]{32}(-output|-errors)?")
Document: TypeAlias = dict[str, Any]


class OwnerFolder:
    """The files and batches of one owner. No id leads to those of another one, or out of the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, root: Path, owner: str) -> OwnerFolder:
        """Return the folder of an owner, whose name may have any characters."""
        path = root / hashlib.sha256(owner.encode()).hexdigest()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(path)

    def read(self, object_id: str) -> Document | None:
        """Return what the API says of a file or batch; None if there is none with this id."""
        if not _ID.fullmatch(object_id):
            return None
        try:
            document: Document = orjson.loads((self.path / f"{object_id}.json").read_bytes())
        except FileNotFoundError:
            return None
        cancel = self.path / f"{object_id}.cancel"
        if document["status"] in OPEN and cancel.exists():
            document |= {"status": "cancelling", "cancelling_at": int(cancel.stat().st_mtime)}
        return document

    def all(self, kind: str = "") -> list[Document]:
        """Return all files and batches, or those of one kind, the oldest first."""
        found = (self.read(path.stem) for path in self.path.glob(f"{kind}*.json"))
        return sorted(filter(None, found), key=lambda each: (each["created_at"], each["id"]))

    def marker(self, batch_id: str) -> Path:
        """Return the file that says that a batch is not at its end."""
        return self.path.with_name(f"{self.path.name}.{batch_id}")

    def write(self, document: Document) -> Document:
        """Store a document, and return it."""
        outputs.replace(self.path / f"{document['id']}.json", orjson.dumps(document).decode(), 0o600)
        return document

    def add_file(self, file_id: str, name: str, seconds: int, purpose: str) -> Document:
        """Make a file of the API of a content that is complete."""
        now, size = int(time.time()), (self.path / file_id).stat().st_size
        document = {"id": file_id, "object": "file", "bytes": size, "created_at": now, "expires_at": now + seconds}
        return self.write(document | {"filename": name, "purpose": purpose, "status": "processed"})

    def delete(self, object_id: str) -> None:
        """Delete a file or batch."""
        for name in (f"{object_id}.json", object_id):
            (self.path / name).unlink(missing_ok=True)

    def full(self) -> bool:
        """Return whether the owner has so many files and batches that a list of them would take long."""
        return len(list(self.path.iterdir())) >= _MAX_ENTRIES

    def sweep(self) -> None:
        """Delete what has expired, and contents without a document, as of uploads that were cut off."""
        now, found = time.time(), self.all()
        running = [each for each in found if each["status"] in (*OPEN, "cancelling")]
        used = {name for batch in running for name in (batch["id"], batch["input_file_id"], *output_ids(batch["id"]))}
        known = {each["id"] for each in found} | used
        for each in found:
            end = each["expires_at"] if each["object"] == "file" else each["created_at"] + KEPT_S
            if end <= now and each["id"] not in used:
                self.delete(each["id"])
        for path in self.path.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stem not in known and path.stat().st_mtime < now - DAY_S:
                    path.unlink()


def output_ids(batch_id: str) -> tuple[str, str]:
    """Return the ids of the output file and the error file of a batch."""
    random = batch_id.removeprefix("batch_")
    return f"file-{random}-output", f"file-{random}-errors"
