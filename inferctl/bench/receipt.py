"""A receipt: one configuration's measurement as a JSON document that describes itself and shows when it was altered.

`seal` is the sha256 of the document without it, in canonical form. It guards against accidents and edits, not against somebody who
computes a new one. docs/bench.md describes every key.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferctl.errors import InvalidRunError, UsageError

SCHEMA = "inferctl.receipt/1"
_REQUIRED = frozenset({"configuration", "environment", "plan", "precision", "quality", "runs", "summary", "validity"})


@dataclass(frozen=True)
class Receipt:
    """A sealed document and where it is kept."""

    path: Path
    data: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the configuration."""
        return str(self.data["configuration"]["name"])

    @property
    def valid(self) -> bool:
        return bool(self.data["validity"]["valid"])


def canonical(document: dict[str, Any]) -> bytes:
    """The form that is hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def seal_of(document: dict[str, Any]) -> str:
    """sha256 (hex) of the document without its seal."""
    return hashlib.sha256(canonical({key: value for key, value in document.items() if key != "seal"})).hexdigest()


def write(path: Path, document: dict[str, Any]) -> Receipt:
    """Seal `document` and write it atomically."""
    plain = json.loads(canonical({"schema": SCHEMA, **document}))
    sealed = {**plain, "seal": seal_of(plain)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(sealed, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    part.rename(path)
    return Receipt(path, sealed)


def load(path: Path) -> Receipt:
    """Read a receipt. Raises `UsageError` when it is none, `InvalidRunError` when it was altered after it was sealed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as a receipt: {error}", "`inferctl bench` writes receipts") from None
    if not isinstance(data, dict) or not str(data.get("schema", "")).startswith("inferctl.receipt/"):
        raise UsageError(
            f"{path} is not a receipt", "`inferctl bench` writes receipts, into receipts/ of its output folder"
        )
    if data["schema"] != SCHEMA:
        raise UsageError(
            f"{path} has the schema {data['schema']}, this version reads {SCHEMA}",
            "use the inferctl that wrote it, or run the bench again",
        )
    if data.get("seal") != seal_of(data):
        raise InvalidRunError(
            f"{path} was altered after it was sealed", "measure again: `inferctl bench` writes a new receipt"
        )
    if missing := _REQUIRED - data.keys():
        raise UsageError(
            f"{path} is incomplete: it has no {', '.join(sorted(missing))}",
            "run the bench again: it writes a new receipt",
        )
    return Receipt(path, data)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number that a receipt may hold")
