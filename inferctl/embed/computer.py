"""What a range of the input is computed with: engines in this machine, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from inferctl.reading.rows import Rows

# A text, or the two texts of a pair.
Input: TypeAlias = str | tuple[str, str]


class Computed(NamedTuple):
    """What came of the inputs of a range, in their order.

    `rows`: of those without an error. `errors`: a stable code and the reason of the others, as `code: reason`,
    by their position. `tokens`: of each input,
    0 of one with an error. `flops`: without padding, 0 if unknown. `distinct`: inputs that were computed.
    """

    rows: Rows
    errors: dict[int, str]
    tokens: npt.NDArray[np.int32]
    flops: float = 0.0
    distinct: int = 0


@dataclass
class Progress:
    """What was computed since the start, over all ranges, counted as batches end. `inputs`: with equal ones."""

    inputs: int = 0
    tokens: int = 0
    flops: float = 0.0


class Computer(Protocol):
    """Computes ranges. It is ready after `start`, and several ranges may be in flight."""

    progress: Progress

    async def start(self) -> dict[str, Any]:
        """Start, and return what identifies the vectors: model, revision, digest, precision, dimensions, device.

        Raises `InferctlError`.
        """

    async def compute(self, inputs: Sequence[Input]) -> Computed:
        """Compute the inputs of a range. Equal ranges give equal rows, bit by bit, if no server is between.

        Raises `InferctlError` for what stops the whole run; an input that cannot be computed is in `errors`.
        """

    async def close(self) -> None:
        """End what `start` started."""
