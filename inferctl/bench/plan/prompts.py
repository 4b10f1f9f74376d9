"""Draw prompts of given lengths, for generation servers. Lengths are fixed, or those of recorded conversations."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from inferctl import assets
from inferctl.bench.plan.shape import Generation
from inferctl.errors import UsageError, did_you_mean
from inferctl.estimate import lengths

# Different prompts of a run. Each of them gets another prefix whenever it is sent.
REQUESTS = 512
# A cache-busting prefix of typical length, and its tokens and those of an English word if no tokenizer counts them.
_PREFIX, _PREFIX_TOKENS, _TOKENS_PER_WORD = "123456 1234", 8, 1.3
_COLUMNS = ("input_tokens", "output_tokens")


@dataclass(frozen=True)
class Prompts:
    """`groups` has the common start of all prompts and the rest of each; the tokens requested for and from each."""

    groups: list[list[str]]
    input_tokens: list[int]
    output_tokens: list[int]


def draw(
    settings: Generation, texts: Sequence[str], unique: bool, random: np.random.Generator, tokenizer: Path | None
) -> Prompts:
    """Return prompts of consecutive words of `texts`. `unique`: leave room for the cache-busting prefix.

    Tokens are counted with the model's `tokenizer.json`; None estimates them from the number of words. Raises
    `UsageError`.
    """
    pairs = _lengths(settings, random)
    words = [word for number in random.permutation(len(texts)) for word in texts[number].split()]
    tokens = _Tokens(words, tokenizer)
    prefix = tokens.prefix if unique else 0
    common_tokens = round(settings.common_prefix * min(length for length, _ in pairs))
    common = " ".join(_take(itertools.cycle(words), common_tokens, tokens))
    groups = []
    for length, _ in pairs:
        start = int(random.integers(0, len(words)))
        following = itertools.islice(itertools.cycle(words), start, None)
        groups.append([common, " ".join(_take(following, length - common_tokens - prefix, tokens))])
    return Prompts(groups, [length for length, _ in pairs], [output for _, output in pairs])


def _take(words: Iterator[str], limit: int, tokens: _Tokens) -> Iterator[str]:
    """Yield words that have `limit` tokens in total, or as many as fit. At least one if `limit` is above 0."""
    total = 0.0
    for word in words:
        total += tokens.of(word)
        if limit <= 0 or (total > limit and total > tokens.of(word)):
            return
        yield word


class _Tokens:
    """Tokens of words. Tokenizers split a text at spaces first, so the tokens of a text are those of its words."""

    def __init__(self, words: Sequence[str], tokenizer: Path | None) -> None:
        self.prefix, self._counts = _PREFIX_TOKENS, dict.fromkeys(words, _TOKENS_PER_WORD)
        if tokenizer is None or not tokenizer.is_file() or not find_spec("tokenizers"):
            return
        texts = ["", f" {_PREFIX}", *(f" {word}" for word in self._counts)]
        # A tokenizer may mark the ends of each text, so the empty text can have tokens.
        ends, prefix, *counts = lengths.of_texts(texts, tokenizer, 1_000_000)[0]
        self.prefix = prefix - ends
        self._counts = {word: count - ends for word, count in zip(self._counts, counts, strict=True)}

    def of(self, word: str) -> float:
        return self._counts[word]


def _lengths(settings: Generation, random: np.random.Generator) -> list[tuple[int, int]]:
    """Return the input and output tokens of each request."""
    if settings.lengths is None:
        return [(settings.input_tokens, settings.output_tokens)] * REQUESTS
    rows = read_lengths(settings.lengths)
    limit = settings.max_request_tokens
    kept = [row for row in rows if limit is None or sum(row) <= limit]
    if not kept:
        raise UsageError(
            f"no request of {settings.lengths} has at most {limit} tokens", "increase `max_request_tokens`"
        )
    return [kept[number] for number in random.integers(0, len(kept), REQUESTS)]


def read_lengths(name: str) -> list[tuple[int, int]]:
    """Return (input tokens, output tokens) of each row of a distribution of benchmarks/corpora, or of a CSV file.

    Raises `UsageError`.
    """
    folder = assets.root() / "benchmarks" / "corpora"
    path = Path(name) if name.endswith(".csv") or "/" in name else folder / f"{name}.csv"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.csv"))
        raise UsageError(
            f"lengths {name!r} not found",
            did_you_mean(name, known) or f"pass IN,OUT (128,64), {', '.join(known)}, or the path of a .csv file",
        )
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [(int(row[_COLUMNS[0]]), int(row[_COLUMNS[1]])) for row in csv.DictReader(stream)]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        rows = []
    if not rows or min(map(min, rows)) < 1:
        raise UsageError(
            f"{path} is not a table of lengths",
            f"write a CSV file with the columns {' and '.join(_COLUMNS)} and positive integers",
        )
    return rows
