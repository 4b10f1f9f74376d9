"""What ranges of the input are computed with: engines in this machine, or a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from inferctl.reading.rows import Rows, Vectors, join_rows

# A text, or the two texts of a pair.
Input: TypeAlias = str | tuple[str, str]
# What came of an input: its row, or a stable code and the reason why there is none, as `code: reason`; and its tokens.
Result: TypeAlias = tuple[Vectors | str, int]
# Gets the results of a batch with the positions of its inputs, and its floating-point operations.
Report: TypeAlias = Callable[[Iterable[tuple[int, Result]], float], None]


@dataclass
class Progress:
    """What was done since the start, over all ranges. `rows`: with those that have errors."""

    rows: int = 0
    errors: int = 0
    tokens: int = 0
    flops: float = 0.0


class Computed(NamedTuple):
    """What came of the inputs of a range, in their order.

    `rows`: of those without an error. `errors`: of the others, by their position. `tokens`: of each input, 0 of one
    with an error. `flops`: without padding, 0 if unknown. `distinct`: how many different ones have a row.
    """

    rows: Rows
    errors: dict[int, str]
    tokens: npt.NDArray[np.int32]
    flops: float
    distinct: int


class Computer(Protocol):
    """Computes ranges. It is ready after `start`, and several ranges may be in flight."""

    async def start(self) -> dict[str, Any]:
        """Start, and return what identifies the vectors: model, revision, digest, precision, dimensions, device.

        Raises `InferctlError`.
        """

    async def compute(self, inputs: Sequence[Input], report: Report) -> None:
        """Compute the distinct inputs of a range, and report each once, in any order.

        Equal ranges give equal rows, bit by bit, if no server is between. Raises `InferctlError` for what stops the
        whole run.
        """

    async def close(self) -> None:
        """End what `start` started."""


async def compute(computer: Computer, inputs: Sequence[Input], progress: Progress) -> Computed:
    """Return what comes of the inputs of a range, of which equal ones are computed once. Counts it in `progress`."""
    numbers: dict[Input, int] = {}
    places = [numbers.setdefault(each, len(numbers)) for each in inputs]
    repeats = np.bincount(np.array(places, np.int64)).tolist()
    found: list[Result] = [("", 0)] * len(numbers)
    total = 0.0

    def report(results: Iterable[tuple[int, Result]], flops: float) -> None:
        nonlocal total
        for number, (row, tokens) in results:
            found[number] = row, tokens
            progress.rows += repeats[number]
            progress.tokens += repeats[number] * tokens
        progress.flops += flops
        total += flops

    if numbers:
        await computer.compute(list(numbers), report)
    results = [found[place] for place in places]
    errors = {place: row for place, (row, _) in enumerate(results) if isinstance(row, str)}
    rows = [row for row, _ in results if not isinstance(row, str)]
    tokens = np.array([tokens for _, tokens in results], np.int32)
    return Computed(join_rows(rows), errors, tokens, total, sum(not isinstance(row, str) for row, _ in found))
