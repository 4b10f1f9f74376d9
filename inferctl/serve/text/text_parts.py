"""How long texts are cut before they are tokenized, pairs afterwards, and which texts are rejected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from inferctl.reading.rows import Tokens

# Long requests are tokenized in slices of about this many characters, so that they take turns on the threads.
SLICE_CHARACTERS = 250_000
# A text is first tokenized up to this many characters per token that the model accepts. To tokenize 30 MiB of words
# would take 20 s and 5 GB, for 256 tokens.
CHARACTERS_PER_TOKEN = 8
# Half of the shortest head is longer than the longest word that BERT's tokenizer splits (100 or 200 characters).
MIN_HEAD = 1_024
# A text that has not enough tokens in this many characters is blanks or one very long word. It is rejected.
MAX_HEAD = 250_000
# The token ids of a pair of texts, and the index of the first token of the second segment: the number of ids if the
# tokenizer gives no second segment.
Pair: TypeAlias = tuple[Tokens, int]


class InputError(Exception):
    """Text `index` of a request (None: its only query) cannot be tokenized.

    `code` is stable: `context_length_exceeded`, `empty_input` or `text_too_long`. `field` names the argument: `input`,
    `query` or `documents`. `problem` is what is wrong with the text.
    """

    def __init__(self, index: int | None, code: str, message: str, field: str = "input") -> None:
        super().__init__(f"{field} {message}" if index is None else f"{field}[{index}] {message}")
        self.index, self.code, self.problem, self.field = index, code, message, field


def head_of(text: str, longest: int) -> str:
    """Return the start of a text: at most `longest` characters, at least half of them, if possible up to a word end."""
    if len(text) <= longest:
        return text
    head = text[:longest]
    end = max(head.rfind(space, longest // 2) for space in " \n\t")
    return head if end < 0 else head[:end]


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


def require_truncation(index: int, truncate: bool, limit: int, field: str = "input") -> None:
    """Raise `InputError` for a text with more than `limit` tokens, unless it may be truncated."""
    if not truncate:
        message = f"has more than {limit} tokens; set `truncate` to true to shorten it"
        raise InputError(index, "context_length_exceeded", message, field)


def not_empty(ids: Tokens, index: int, field: str = "input") -> Tokens:
    """Return the ids of a text. Raises `InputError` if there are none."""
    if not len(ids):
        raise InputError(index, "empty_input", "has no tokens", field)
    return ids


def listed(query: str | Sequence[str]) -> Sequence[str]:
    """Return the query of all documents as a list of one, or the queries."""
    return [query] if isinstance(query, str) else query
