"""Token ids of a text out of those of its words, each asked of the tokenizer once.

BERT's tokenizer splits at every space and makes tokens of each word by itself, so the ids of a text are those of what stands between its spaces, one after another.
A word that was seen before costs a look into a dictionary, one that was not costs its own call: with all words known a text takes a fifteenth of the tokenizer's time, with none twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing, RobertaProcessing, TemplateProcessing

from inferctl.serve.types import Tokens

# About 12 MB. Then all are forgotten: the frequent ones are soon back.
_MOST_WORDS = 65_536
# Longer ones are not kept: hardly one comes again.
_LONGEST_WORD = 64
# What is odd about words, for the comparison with the tokenizer itself.
_PROBES = (
    "A river  runs\n\tthrough it, unbelievably.",
    " na\u00efve e\u0301 \u0301 x\u00ad \u0130 \u03a3 ",
    "\u5317\u4eac \u3000\U0001f680",
    "[MASK] [CLS]",
    "x" * 300,
)

# Token ids with the special ones (int32), and whether there were more than the model takes.
Row: TypeAlias = tuple[Tokens, bool]
Encode: TypeAlias = Callable[[list[str]], Sequence[Encoding]]


class Words:
    """The words seen, with their ids. Shared by threads: what one of them learns the others know."""

    def __init__(self, before: list[int], after: list[int], limit: int) -> None:
        """Ids that stand before and after those of every text; `limit` counts them too."""
        self._before, self._after = _bytes(before), _bytes(after)
        self._room = len(_bytes([0] * (limit - len(before) - len(after))))
        self._known: dict[str, bytes] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer, limit: int) -> Words | None:
        """For a tokenizer that truncates to `limit`; None for one that does not make tokens of each word by itself."""
        parts = (
            (tokenizer.normalizer, BertNormalizer),
            (tokenizer.pre_tokenizer, BertPreTokenizer),
            (tokenizer.model, WordPiece),
            (tokenizer.post_processor, BertProcessing | RobertaProcessing | TemplateProcessing),
        )
        added = tokenizer.get_added_tokens_decoder().values()
        if not all(isinstance(part, kind) for part, kind in parts) or not all(
            token.content.isascii() and len(token.content.split()) == 1 for token in added
        ):
            return None
        word, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
        if not word or word[0] not in whole or len(whole) == len(word):
            return None
        start = whole.index(word[0])
        words = cls(whole[:start], whole[start + len(word) :], limit)
        rows = words.encode(_PROBES, lambda asked: tokenizer.encode_batch_fast(asked, add_special_tokens=False))
        same = all(
            ids.tolist() == encoding.ids and more == bool(encoding.overflowing)
            for (ids, more), encoding in zip(rows, tokenizer.encode_batch(list(_PROBES)), strict=True)
        )
        return words if same else None

    def encode(self, texts: Sequence[str], encode: Encode) -> list[Row]:
        """A row of each text; `encode` makes tokens of words, without special ones."""
        rows = self.encode_if_cheap(texts, encode, sum(map(len, texts)))
        assert rows is not None  # no text has more unknown characters than characters
        return rows

    def encode_if_cheap(self, texts: Sequence[str], encode: Encode, most: int) -> list[Row] | None:
        """The same, or None where the words that are not known have more than `most` characters."""
        known, split = self._known, [text.split(" ") for text in texts]
        try:
            return self._rows(split, known.__getitem__)
        except KeyError:
            unknown = list(set().union(*split).difference(known))
        if sum(map(len, unknown)) > most:
            return None
        found = dict(zip(unknown, (_bytes(encoding.ids) for encoding in encode(unknown)), strict=True))
        rows = self._rows(split, lambda word: found[word] if word in found else known[word])
        known.update((word, ids) for word, ids in found.items() if len(word) <= _LONGEST_WORD)
        if len(known) > _MOST_WORDS:
            self._known = {}  # not emptied: another thread may be reading it
        return rows

    def _rows(self, split: Sequence[Sequence[str]], ids_of: Callable[[str], bytes]) -> list[Row]:
        joined = [b"".join(map(ids_of, words)) for words in split]
        return [
            (np.frombuffer(self._before + ids[: self._room] + self._after, np.int32), len(ids) > self._room)
            for ids in joined
        ]


def _bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()
