"""What goes into a model and comes out of it: token ids, and rows of numbers, also as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = npt.NDArray[np.int32]
Vectors: TypeAlias = npt.NDArray[np.float32]
# One row of numbers for each sequence: one array if all have the same width.
Rows: TypeAlias = Vectors | list[Vectors]


def finite_rows(rows: Rows) -> npt.NDArray[np.bool_]:
    """Return for each row whether it has neither NaN nor infinity."""
    if isinstance(rows, list):
        return np.array([bool(np.isfinite(row).all()) for row in rows])
    return np.asarray(np.isfinite(rows).all(axis=1), dtype=np.bool_)


def pack_rows(rows: Rows) -> tuple[int, int, bytes]:
    """Return number and width of rows, and their bytes; the width -1 if the bytes begin with the width of each row."""
    count, width, buffers = row_buffers(rows)
    return count, width, b"".join(buffers)


def row_buffers(rows: Rows) -> tuple[int, int, list[memoryview]]:
    """Do what `pack_rows` does, but copy nothing."""
    if not isinstance(rows, list):
        return *rows.shape, [_bytes_of(rows, "<f4")]
    widths = np.array([len(row) for row in rows])
    return len(rows), -1, [_bytes_of(widths, "<i4"), *(_bytes_of(row, "<f4") for row in rows)]


def _bytes_of(values: npt.NDArray[Any], dtype: str) -> memoryview:
    return np.ascontiguousarray(values, dtype).reshape(-1).view(np.uint8).data


def unpack_rows(count: int, width: int, body: bytes, offset: int) -> tuple[Rows, int]:
    """Return the rows that `pack_rows` packed, from `offset` of `body`, and where they end."""
    if width >= 0:
        rows = np.frombuffer(body, dtype="<f4", count=count * width, offset=offset).reshape(count, width)
        return rows, offset + rows.nbytes
    widths = np.frombuffer(body, dtype="<i4", count=count, offset=offset)
    values = np.frombuffer(body, dtype="<f4", count=int(widths.sum()), offset=offset + widths.nbytes)
    return join_rows(np.split(values, np.cumsum(widths)[:-1])), offset + widths.nbytes + values.nbytes


def join_rows(rows: Sequence[Vectors]) -> Rows:
    """Return rows as one array if all have the same width."""
    return np.stack(rows) if len({len(row) for row in rows}) == 1 else list(rows)


def slices(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of consecutive parts of things of these sizes, such as texts of so many characters.

    Each part has one thing or a size of at most `most`.
    """
    start = characters = 0
    for index, size in enumerate(sizes):
        if index > start and characters + size > most:
            yield start, index
            start, characters = index, 0
        characters += size
    yield start, len(sizes)
