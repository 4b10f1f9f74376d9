"""Token ids of a text out of those of its words, remembered from texts before.

BERT's tokenizer splits at every space and makes tokens of each word by itself (but for an added token with a space in it), so the ids of a text are those of what stands between its
spaces, one after another. A text whose words are all known takes a tenth of the tokenizer's time or less (benchmarks/peers/tokenising.py).
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

from inferctl.serve.types import Tokens

# About 12 MB of English; 65 MB if each were the longest of the oddest. Then all are forgotten: the frequent ones are soon back.
_MOST_WORDS = 65_536
# Longer ones are not kept: hardly one comes again.
_LONGEST_WORD = 64
# What is odd about words, for the comparison with the tokenizer itself.
_PROBES = (
    "A river  runs\n\tthrough it, unbelievably.",
    " na\u00efve e\u0301 \u0301 x\u00ad \u0130 \u03a3 ",
    "\u5317\u4eac \u3000\U0001f680",
    "[MASK] [CLS]",
    "x" * _LONGEST_WORD,
)

# Token ids with the special ones (int32), and whether there were more than the model takes.
Row: TypeAlias = tuple[Tokens, bool]


class Words:
    """The words seen, with their ids. Shared by threads: what one of them learns the others know."""

    def __init__(self, before: list[int], after: list[int], limit: int) -> None:
        """Ids that stand before and after those of every text; `limit` counts them too."""
        self._before, self._after = _bytes(before), _bytes(after)
        self._room = 4 * (limit - len(before) - len(after))  # bytes of int32
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
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        if not all(isinstance(part, kind) for part, kind in parts) or not all(
            content.isascii() and content.split() == [content] for content in added
        ):
            return None
        try:
            return cls._compared(tokenizer, limit)
        except Exception:  # noqa: BLE001  # as the library raises where the vocabulary lacks a token: other texts may do
            return None

    @classmethod
    def _compared(cls, tokenizer: Tokenizer, limit: int) -> Words | None:
        """None where the odd texts come to something else than the tokenizer says."""
        ask = partial(tokenizer.encode_batch_fast, add_special_tokens=False)
        (word,), whole = without_panic(ask, ["a"]), without_panic(tokenizer.encode, "a").ids
        if not word.ids or word.ids[0] not in whole or len(whole) == len(word.ids):
            return None
        start = whole.index(word.ids[0])
        words = cls(whole[:start], whole[start + len(word.ids) :], limit)
        probes = [*_PROBES, " ".join(added.content for added in tokenizer.get_added_tokens_decoder().values())]
        words.learn(words.unknown(probes), ask)
        rows = words.rows(probes)
        encodings = zip(probes, without_panic(tokenizer.encode_batch, probes), strict=True)
        same = all(
            (rows[probe][0].tolist(), rows[probe][1]) == (encoding.ids, bool(encoding.overflowing))
            for probe, encoding in encodings
        )
        return words if same else None

    def rows(self, texts: Iterable[str]) -> dict[str, Row]:
        """The row of each text whose words are all known."""
        known, found = self._known, {}
        for text in texts:
            try:
                ids = b"".join(map(known.__getitem__, text.split(" ")))
            except KeyError:
                continue
            row = np.frombuffer(self._before + ids[: self._room] + self._after, np.int32)
            found[text] = (row, len(ids) > self._room)
        return found

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """The words of texts that can still be learnt."""
        words = set[str]().union(*(text.split(" ") for text in texts)).difference(self._known)
        return [word for word in words if len(word) <= _LONGEST_WORD]

    def learn(self, words: list[str], ask: Callable[[list[str]], Sequence[Encoding]]) -> None:
        """Have `ask` make tokens of words, without special ones, and remember them, but for those beyond `_MOST_WORDS`. Costs about 4 us a word."""
        known, words = self._known, words[:_MOST_WORDS]
        if len(known) + len(words) > _MOST_WORDS:
            known = self._known = {}  # not emptied: another thread may be reading it
        known.update(zip(words, (_bytes(encoding.ids) for encoding in ask(words)), strict=True))


def _bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def without_panic(call: Callable[[Any], Any], given: Any) -> Any:
    """`call(given)`. A panic of the library, which is no `Exception`, becomes a `RuntimeError`: it must not end a thread or strand a request."""
    try:
        return call(given)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizer panicked: {error}") from error
