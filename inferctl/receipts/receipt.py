"""A receipt: the measurement of one configuration as a JSON document with a seal that shows changes.

`seal` is the sha256 of the document without this key, in canonical form. It detects accidents and edits, but does not
stop a person who computes a new seal. docs/receipts.md describes every key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferctl.core import outputs
from inferctl.core.errors import InvalidRunError, UsageError

SCHEMA = "inferctl.receipt/1"
_REQUIRED = frozenset({"configuration", "environment", "plan", "precision", "quality", "runs", "summary", "validity"})
# A receipt, or an object inside it, as read from JSON.
JsonObject = Mapping[str, Any]


@dataclass(frozen=True)
class Receipt:
    """A sealed document and its file."""

    path: Path
    data: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the name of the configuration."""
        return str(self.data["configuration"]["name"])

    @property
    def valid(self) -> bool:
        return bool(self.data["validity"]["valid"])

    @property
    def seal(self) -> str:
        return str(self.data["seal"])

    @property
    def runs(self) -> Sequence[JsonObject]:
        runs: Sequence[JsonObject] = self.data["runs"]
        return runs

    @property
    def url(self) -> str | None:
        """Return the address of a server that inferctl did not start; None for a server that it started."""
        url: str | None = self.data["configuration"].get("url")
        return url

    @property
    def precision(self) -> str | None:
        """Return the effective precision, if the server states it."""
        precision: str | None = self.data["precision"].get("effective")
        return precision

    @property
    def weights_sha256(self) -> str | None:
        digest: str | None = self.data["model"].get("sha256")
        return digest

    @property
    def load(self) -> JsonObject:
        """Return the load of the plan."""
        return self.data["plan"].get("load") or {}

    @property
    def task(self) -> str:
        """Return the task of the server. Older receipts are all of embeddings."""
        return str(self.load.get("task") or "embed")

    @property
    def quality(self) -> JsonObject:
        quality: JsonObject = self.data["quality"]
        return quality


def canonical(document: JsonObject) -> bytes:
    """Return the bytes that are hashed: JSON with sorted keys, without spaces and NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def seal_of(document: JsonObject) -> str:
    """Return the sha256 (hex) of the document without its seal."""
    return hashlib.sha256(canonical({key: value for key, value in document.items() if key != "seal"})).hexdigest()


def sealed(path: Path, document: JsonObject) -> Receipt:
    """Return the receipt of `document` for the file `path`, which `save` writes."""
    plain = json.loads(canonical({"schema": SCHEMA, **document}))
    return Receipt(path, {**plain, "seal": seal_of(plain)})


def save(found: Receipt) -> Receipt:
    """Write a receipt atomically and return it."""
    found.path.parent.mkdir(parents=True, exist_ok=True)
    outputs.replace(found.path, json.dumps(found.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return found


def write(path: Path, document: JsonObject) -> Receipt:
    """Seal `document`, write it atomically and return it."""
    return save(sealed(path, document))


def load(path: Path) -> Receipt:
    """Read a receipt.

    Raises `UsageError` if the file is not a receipt, and `InvalidRunError` if it was changed after it was sealed.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_reject_constant)
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"cannot read {path} as a receipt: {why}", "`inferctl bench` writes receipts") from None
    if not isinstance(data, dict) or not str(data.get("schema", "")).startswith("inferctl.receipt/"):
        raise UsageError(
            f"{path} is not a receipt", "`inferctl bench` writes receipts into receipts/ of its output folder"
        )
    if data["schema"] != SCHEMA:
        raise UsageError(
            f"{path} has the schema {data['schema']}, but this version reads {SCHEMA}",
            "use the version of inferctl that wrote it, or run the benchmark again",
        )
    try:
        seal = seal_of(data)
    except ValueError as error:  # 1e999 is infinity, and text can be half of a character
        raise UsageError(f"cannot read {path} as a receipt: {error}", "`inferctl bench` writes receipts") from None
    if data.get("seal") != seal:
        raise InvalidRunError(
            f"{path} was altered after it was sealed", "measure again: `inferctl bench` writes a new receipt"
        )
    if missing := _REQUIRED - data.keys():
        raise UsageError(
            f"{path} is incomplete: these keys are missing: {', '.join(sorted(missing))}",
            "run the benchmark again: it writes a new receipt",
        )
    return Receipt(path, data)


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not allowed in a receipt")
