"""Draw prompts of given lengths, for generation servers. Lengths are fixed, or those of recorded conversations."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from inferctl.bench.plan import tokens
from inferctl.bench.plan.shape import Generation
from inferctl.core import assets
from inferctl.core.errors import UsageError, did_you_mean

# Different prompts of a run. Each of them gets another prefix whenever it is sent.
REQUESTS = 512
# Cache-busting prefixes, and the tokens of one and those of an English word if no tokenizer counts them.
_PREFIXES = ("123456 000000", "100000 000017", "987654 001234", "555552 020406", "700001 999999")
_PREFIX_TOKENS, _TOKENS_PER_WORD = 12, 1.3
# Prompts of which the length is verified, and words of which one is chosen as the first of all prompts.
_VERIFIED, _CANDIDATES = 8, 40
_COLUMNS = ("input_tokens", "output_tokens")


@dataclass(frozen=True)
class Prompts:
    """`groups` has the common start of all prompts and the rest of each; the tokens requested for and from each.

    `approximate` is why prompts may be longer or shorter than requested; None if each has exactly its tokens.
    """

    groups: list[list[str]]
    input_tokens: list[int]
    output_tokens: list[int]
    approximate: str | None = None


def draw(
    settings: Generation,
    texts: Sequence[str],
    unique: bool,
    random: np.random.Generator,
    tokenizer: tokens.Tokenizer | None,
) -> Prompts:
    """Return prompts of consecutive words of `texts`. `unique`: leave room for the cache-busting prefix.

    Each prompt has exactly the tokens of its length, without those that the server adds (chat template, start of
    text). Without a `tokenizer`, they are estimated from the number of words. Raises `UsageError`.
    """
    pairs = _lengths(settings, random)
    words = [word for number in random.permutation(len(texts)) for word in texts[number].split()]
    costs = _Costs(words, tokenizer)
    common = _text(itertools.cycle(words), round(settings.common_prefix * min(length for length, _ in pairs)), costs)
    prefix = costs.prefix(bool(common.text)) if unique else 0
    groups = []
    too_short = 0
    for length, _ in pairs:
        start = int(random.integers(0, len(words)))
        rest = _text(itertools.islice(itertools.cycle(words), start, None), length - common.tokens - prefix, costs)
        too_short += common.tokens + prefix + rest.tokens > length
        groups.append([common.text, rest.text])
    found = Prompts(groups, [length for length, _ in pairs], [output for _, output in pairs])
    return replace(found, approximate=_inexact(found, unique, tokenizer, too_short))


def _inexact(found: Prompts, unique: bool, tokenizer: tokens.Tokenizer | None, too_short: int) -> str | None:
    """Return why prompts have other lengths than requested; None if some of them, as they are sent, do not."""
    if tokenizer is None:
        return "no tokenizer counted their tokens: pass the folder of the model with `--model`"
    if too_short:
        return f"{too_short} of {REQUESTS} are shorter than the numbers that make a prompt unique"
    prefixes = itertools.cycle(_PREFIXES if unique else ("",))
    parts = [
        [" ".join(filter(None, [common, prefix])), rest]
        for (common, rest), prefix in zip(found.groups[:_VERIFIED], prefixes, strict=False)
    ]
    # A chat has two messages, a completion one text.
    joined = tokenizer.of_texts([" ".join(filter(None, each)) for each in parts])
    apart = [sum(tokenizer.of_texts([text for text in each if text])) for each in parts]
    if not joined == apart == found.input_tokens[:_VERIFIED]:
        return "in this tokenizer, the tokens of a text are not those of its words and numbers"
    return None


@dataclass(frozen=True)
class _Text:
    text: str
    tokens: float


def _text(words: Iterator[str], limit: float, costs: _Costs) -> _Text:
    """Return a text of consecutive words that has `limit` tokens. At its end, words that do not fit are left out.

    It has one word if the limit is less than that, and none if the limit is 0 or less.
    """
    if limit <= 0:
        return _Text("", 0)
    # The first word has the same tokens at the start of a text and after a space, so the text has the same in a message
    # of its own and after other text.
    found, total, skipped = [costs.first], costs.of(costs.first), 0
    for word in words:
        cost = costs.of(word)
        if total + costs.least > limit or skipped == _CANDIDATES * 10:
            break
        skipped = 0 if total + cost <= limit else skipped + 1
        if not skipped:
            found.append(word)
            total += cost
    return _Text(" ".join(found), total)


class _Costs:
    """Tokens of words. Tokenizers split a text at spaces first, so the tokens of a text are those of its words."""

    def __init__(self, words: Sequence[str], tokenizer: tokens.Tokenizer | None) -> None:
        distinct = list(dict.fromkeys(words))
        self.first, self._tokenizer = distinct[0], tokenizer
        self._counts = dict.fromkeys(distinct, _TOKENS_PER_WORD)
        if tokenizer:
            self._counts = dict(zip(distinct, tokenizer.of_words(distinct), strict=True))
            candidates = distinct[:_CANDIDATES]
            alone = zip(candidates, tokenizer.of_texts(candidates), strict=True)
            self.first = next((word for word, count in alone if count == self._counts[word]), self.first)
        self.least = min(self._counts.values())

    def of(self, word: str) -> float:
        return self._counts[word]

    def prefix(self, follows: bool) -> float:
        """Return the tokens of a cache-busting prefix, at the start of a text or after other text."""
        if not self._tokenizer:
            return _PREFIX_TOKENS
        start = "a" if follows else ""
        texts = [start, *(f"{start} {prefix}".strip() for prefix in _PREFIXES)]
        before, *counts = self._tokenizer.of_texts(texts)
        return max(counts) - before


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
