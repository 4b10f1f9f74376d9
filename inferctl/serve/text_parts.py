"""How long texts are cut before they are tokenized, and pairs afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from inferctl.serve.engine_process.engine_protocol import Tokens

# Long requests are tokenized in slices of about this many characters, so that they take turns on the threads.
_SLICE_CHARACTERS = 250_000


def head_of(text: str, longest: int) -> str:
    """Return the start of a text: at most `longest` characters, at least half of them, if possible up to a word end."""
    if len(text) <= longest:
        return text
    head = text[:longest]
    end = max(head.rfind(space, longest // 2) for space in " \n\t")
    return head if end < 0 else head[:end]


def slices(sizes: Sequence[int], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield the bounds of consecutive parts of things of these sizes, such as texts of so many characters.

    Each part has one thing or a size of at most `most`; by default, that of one call of the tokenizer.
    """
    most = _SLICE_CHARACTERS if most is None else most
    start = characters = 0
    for index, size in enumerate(sizes):
        if index > start and characters + size > most:
            yield start, index
            start, characters = index, 0
        characters += size
    yield start, len(sizes)


def common_end(one: Tokens, two: Tokens) -> Tokens:
    """Return the longest end that both have."""
    shortest = min(len(one), len(two))
    same = one[::-1][:shortest] == two[::-1][:shortest]
    return one[len(one) - (shortest if same.all() else int(np.argmin(same))) :]


def longest_first(first: int, second: int, limit: int) -> tuple[int, int]:
    """Return how many tokens of two texts remain, if they are truncated to `limit` as the tokenizers library does."""
    if first + second <= limit:
        return first, second
    shorter = min(first, second, limit // 2)
    return (shorter, limit - shorter) if first <= second else (limit - shorter, shorter)
