"""Number formats of vectors in responses: float16, int8, uint8, and one bit for each dimension.

The values equal those of `quantize_embeddings` of sentence-transformers. int8 and uint8 divide the range of each
dimension into 255 steps. The ranges are those of a model's vectors of many texts, which `inferctl calibrate` writes
into the model folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from inferctl.core import outputs
from inferctl.core.errors import UsageError
from inferctl.models import untrusted
from inferctl.models.model import VECTOR_RANGES

VectorFormat: TypeAlias = Literal["float", "float16", "int8", "uint8", "binary", "ubinary"]
FORMATS: tuple[VectorFormat, ...] = get_args(VectorFormat)
CALIBRATED: tuple[VectorFormat, ...] = ("int8", "uint8")
_SCHEMA = "inferctl.vector-ranges/1"
_STEPS = 255

Matrix: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ranges:
    """The lowest and the highest value of each dimension, each of shape (dimensions,)."""

    low: Matrix
    high: Matrix

    @classmethod
    def of(cls, vectors: Matrix) -> Ranges:
        """Return the ranges of vectors, shape (n, dimensions)."""
        return cls(vectors.min(axis=0), vectors.max(axis=0))

    @property
    def step(self) -> Matrix:
        """The width of one step in each dimension; 1 for a dimension that never changes."""
        step: Matrix = (self.high - self.low) / np.float32(_STEPS)
        step[step == 0] = 1
        return step


def convert(vectors: Matrix, wanted: VectorFormat, ranges: Ranges | None = None) -> npt.NDArray[Any]:
    """Return vectors, shape (n, dimensions), in another format; bits in bytes, the first one highest.

    Values outside of the `ranges`, which int8 and uint8 need, become the nearest step. Values beyond those of float16
    become infinite.
    """
    if wanted == "float":
        return vectors
    if wanted == "float16":
        with np.errstate(over="ignore"):
            return vectors.astype(np.float16)
    if wanted in CALIBRATED:
        assert ranges is not None
        steps = np.clip(np.floor((vectors - ranges.low) / ranges.step), 0, _STEPS)
        return np.asarray(steps if wanted == "uint8" else steps - 128, np.uint8 if wanted == "uint8" else np.int8)
    packed = np.packbits(vectors > 0, axis=-1)
    return packed if wanted == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def size(dimensions: int, wanted: VectorFormat) -> int:
    """Return the bytes of one vector."""
    if wanted in ("binary", "ubinary"):
        return -(-dimensions // 8)
    return dimensions * {"float": 4, "float16": 2}.get(wanted, 1)


def read(folder: Path, digest: Callable[[], str] | None = None) -> dict[int, Ranges]:
    """Return the ranges of a model folder by number of dimensions; empty without a file.

    `digest`: that of the model, which is compared. Raises `UsageError` if the file is not one of `write`, or of another
    model.
    """
    file = folder / VECTOR_RANGES
    if not file.is_file():
        return {}
    try:
        found = untrusted.read_json(file)
        if found["schema"] != _SCHEMA:
            raise ValueError(f"the schema is {found['schema']!r}")
        ranges = of_json(found["ranges"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{file} is not a file of `inferctl calibrate`: {error}", f"remove it, or run `inferctl calibrate {folder}`"
        ) from None
    if digest is not None and found.get("model_sha256") != digest():
        raise UsageError(f"{file} is of other weights than those of its folder", f"run `inferctl calibrate {folder}`")
    return ranges


def write(folder: Path, digest: str, ranges: Mapping[int, Ranges], source: Mapping[str, Any]) -> Path:
    """Write the ranges into the folder of a model and return the file.

    `digest`: that of the model. `source`: the texts and the precision, for the reader.
    """
    file = folder / VECTOR_RANGES
    document = {"schema": _SCHEMA, "model_sha256": digest, **source, "ranges": to_json(ranges)}
    outputs.replace(file, json.dumps(document) + "\n")
    return file


def to_json(ranges: Mapping[int, Ranges]) -> dict[str, Any]:
    """Return ranges as JSON values, for `of_json`."""
    return {str(key): {"min": one.low.tolist(), "max": one.high.tolist()} for key, one in sorted(ranges.items())}


def of_json(rows: Mapping[str, Any]) -> dict[int, Ranges]:
    """Return the ranges of `to_json`. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
    return {int(dimensions): _ranges(row, int(dimensions)) for dimensions, row in rows.items()}


def _ranges(row: Mapping[str, Any], dimensions: int) -> Ranges:
    low, high = (np.asarray(row[name], np.float32) for name in ("min", "max"))
    if low.shape != (dimensions,) or high.shape != (dimensions,):
        raise ValueError(f"there are not {dimensions} numbers")
    if not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
        raise ValueError("a range is not finite, or ends before it begins")
    return Ranges(low, high)
