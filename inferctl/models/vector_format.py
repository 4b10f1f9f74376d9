"""Number formats of vectors in responses: float16, and one bit for each dimension.

The values of bits equal those of `quantize_embeddings` of sentence-transformers.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

VectorFormat: TypeAlias = Literal["float", "float16", "binary", "ubinary"]
FORMATS: tuple[VectorFormat, ...] = get_args(VectorFormat)

Matrix: TypeAlias = npt.NDArray[np.float32]


def convert(vectors: Matrix, wanted: VectorFormat) -> npt.NDArray[Any]:
    """Return vectors, shape (n, dimensions), in another format; bits in bytes, the first one highest.

    Values beyond those of float16 become infinite.
    """
    if wanted == "float":
        return vectors
    if wanted == "float16":
        with np.errstate(over="ignore"):
            return vectors.astype(np.float16)
    packed = np.packbits(vectors > 0, axis=-1)
    return packed if wanted == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def size(dimensions: int, wanted: VectorFormat) -> int:
    """Return the bytes of one vector."""
    if wanted in ("binary", "ubinary"):
        return -(-dimensions // 8)
    return dimensions * (4 if wanted == "float" else 2)
