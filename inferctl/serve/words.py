"""A cache of the token ids of words, from which the ids of a text are concatenated.

BERT's tokenizer splits at every space and tokenizes each word independently, unless an added token contains a space. So
the ids of a text are those of its space-separated words, in order. A text whose words are all cached takes at most a
tenth of the tokenizer's time (benchmarks/peers/tokenising.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing, RobertaProcessing, TemplateProcessing

from inferctl.serve.engine_process.engine_protocol import Tokens

# About 12 MB for English words, and at most 65 MB. A full cache is emptied; frequent words are soon cached again.
_MAX_WORDS = 65_536
# Words longer than this rarely repeat; caching them wastes memory.
_MAX_WORD_LENGTH = 64
# Texts with unusual words, for the comparison with the tokenizer itself.
_PROBES = (
    "A river  runs\n\tthrough it, unbelievably.",
    " na\u00efve e\u0301 \u0301 x\u00ad \u0130 \u03a3 ",
    "\u5317\u4eac \u3000\U0001f680",
    "[MASK] [CLS]",
    "x" * _MAX_WORD_LENGTH,
)

# Token ids (int32) with the special tokens, and whether the text was truncated.
Row: TypeAlias = tuple[Tokens, bool]


class Words:
    """The cached words with their token ids. All threads share it."""

    def __init__(self, before: list[int], after: list[int], limit: int) -> None:
        """`before` and `after`: the special token ids around every text. `limit` counts them too."""
        self._before, self._after = _bytes(before), _bytes(after)
        self._max_bytes = 4 * (limit - len(before) - len(after))  # bytes of int32
        self._known: dict[str, bytes] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer, limit: int) -> Words | None:
        """Return a cache for a tokenizer that truncates to `limit`; None if it does not tokenize word by word."""
        parts = (
            (tokenizer.normalizer, BertNormalizer),
            (tokenizer.pre_tokenizer, BertPreTokenizer),
            (tokenizer.model, WordPiece),
            (tokenizer.post_processor, BertProcessing | RobertaProcessing | TemplateProcessing),
        )
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        if not all(isinstance(part, kind) for part, kind in parts) or not all(
            content.isascii() and content.split() == [content] for content in added
        ):
            return None
        try:
            return cls._for_equal_ids(tokenizer, limit)
        except Exception:  # noqa: BLE001  # the library raises a bare Exception if the vocabulary lacks a token
            return None

    @classmethod
    def _for_equal_ids(cls, tokenizer: Tokenizer, limit: int) -> Words | None:
        """Return a cache, or None if it gives other ids than the tokenizer for the unusual texts."""
        tokenize = partial(tokenizer.encode_batch_fast, add_special_tokens=False)
        (word,), whole = without_panic(tokenize, ["a"]), without_panic(tokenizer.encode, "a").ids
        if not word.ids or word.ids[0] not in whole or len(whole) == len(word.ids):
            return None
        start = whole.index(word.ids[0])
        words = cls(whole[:start], whole[start + len(word.ids) :], limit)
        probes = [*_PROBES, " ".join(added.content for added in tokenizer.get_added_tokens_decoder().values())]
        words.learn(words.unknown(probes), tokenize)
        rows = words.rows(probes)
        encodings = zip(probes, without_panic(tokenizer.encode_batch, probes), strict=True)
        same = all(
            (rows[probe][0].tolist(), rows[probe][1]) == (encoding.ids, bool(encoding.overflowing))
            for probe, encoding in encodings
        )
        return words if same else None

    def rows(self, texts: Iterable[str]) -> dict[str, Row]:
        """Return the row of each text whose words are all cached."""
        known, found = self._known, {}
        for text in texts:
            try:
                ids = b"".join(map(known.__getitem__, text.split(" ")))
            except KeyError:
                continue
            row = np.frombuffer(self._before + ids[: self._max_bytes] + self._after, np.int32)
            found[text] = (row, len(ids) > self._max_bytes)
        return found

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """Return the words of the texts that are not cached and can be."""
        words = set[str]().union(*(text.split(" ") for text in texts)).difference(self._known)
        return [word for word in words if len(word) <= _MAX_WORD_LENGTH]

    def learn(self, words: list[str], tokenize: Callable[[list[str]], Sequence[Encoding]]) -> None:
        """Tokenize words with `tokenize`, without special tokens, and cache at most `_MAX_WORDS` of them.

        This takes about 4 us per word.
        """
        known, words = self._known, words[:_MAX_WORDS]
        if len(known) + len(words) > _MAX_WORDS:
            known = self._known = {}  # a new dictionary: another thread may be reading the old one
        known.update(zip(words, (_bytes(encoding.ids) for encoding in tokenize(words)), strict=True))


def _bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def without_panic(call: Callable[[Any], Any], given: Any) -> Any:
    """Return `call(given)`, and raise a panic of the library as a `RuntimeError`.

    A panic is not an `Exception`. It would end a thread and leave a request without a response.
    """
    try:
        return call(given)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizer panicked: {error}") from error
