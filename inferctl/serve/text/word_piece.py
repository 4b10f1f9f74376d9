"""WordPiece by nanotoken: the ids of the library tokenizers, in a tenth of its time.

nanotoken is young and optional. It is used for a model only if both libraries give equal ids for `hard_texts`.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer

from inferctl.reading.rows import Tokens

# Blocks of Unicode by their first and last code point: writing systems, symbols, invisible and unassigned characters.
_BLOCKS = (
    (0x0000, 0x007F),
    (0x0080, 0x024F),
    (0x0250, 0x036F),
    (0x0370, 0x052F),
    (0x0590, 0x06FF),
    (0x0900, 0x0DFF),
    (0x0E00, 0x0FFF),
    (0x1100, 0x11FF),
    (0x1E00, 0x1FFF),
    (0x2000, 0x206F),
    (0x20A0, 0x2BFF),
    (0x3000, 0x30FF),
    (0x3400, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xE000, 0xFAFF),
    (0xFB00, 0xFFFF),
    (0x1D400, 0x1D7FF),
    (0x1F300, 0x1FAFF),
    (0x20000, 0x2FA1F),
)
_TEXTS_PER_BLOCK, _LONGEST = 16, 24
T = TypeVar("T")


class TokenizedText(NamedTuple):
    """The ids (int32) of a text, at most as many as the model accepts. `size`: how many they were, with the others."""

    ids: Tokens
    size: int


class UnusableError(Exception):
    """nanotoken cannot be used for a tokenizer. The message says why."""


class WordPiece:
    """What `tokenizer` does, truncated to `longest` tokens. Threads can use it at the same time."""

    def __init__(self, tokenizer: Tokenizer, longest: int) -> None:
        """Raises `UnusableError`."""
        try:
            import nanotoken
        except ImportError as error:
            raise UnusableError(f"nanotoken is not installed ({error})") from None
        # It would keep words that it has seen: for each thread, up to 100 MB.
        nanotoken.set_cache_entries(0)
        settings = json.loads(tokenizer.to_str())
        if settings["post_processor"] == {"type": "Sequence", "processors": []}:
            settings["post_processor"] = None
        try:
            self._library = nanotoken.WordPieceTokenizer.from_json(json.dumps(settings))
        except nanotoken.UnsupportedTokenizerError as error:
            raise UnusableError(str(error)) from None
        self._longest = longest
        self._suffix = np.array(self._library.suffix_ids, dtype=np.int32)

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[TokenizedText]:
        """Return the ids of texts."""
        encode = self._library.encode_batch
        flat, offsets = guarded(lambda: encode(texts, add_special_tokens=add_special_tokens, parallel=False))
        ids = flat.view(np.int32)
        return [self._truncated(ids[i:j], add_special_tokens) for i, j in pairwise(offsets.tolist())]

    def _truncated(self, ids: Tokens, add_special_tokens: bool) -> TokenizedText:
        size = len(ids)
        if size > self._longest:
            suffix = self._suffix if add_special_tokens else self._suffix[:0]
            ids = np.concatenate((ids[: self._longest - len(suffix)], suffix))
        return TokenizedText(ids, size)


def create(
    tokenizer: Tokenizer, encode: Callable[[list[str], bool], list[TokenizedText]]
) -> tuple[WordPiece | None, str]:
    """Return nanotoken for `tokenizer`, None if it cannot be used, and the reason for either.

    `tokenizer` truncates; `encode` returns what it gives.
    """
    longest: int = (tokenizer.truncation or {})["max_length"]
    texts = list(hard_texts([token.content for token in tokenizer.get_added_tokens_decoder().values()], longest))
    try:
        found = WordPiece(tokenizer, longest)
        pairs = [
            pair
            for add_special_tokens in (True, False)
            for pair in zip(encode(texts, add_special_tokens), found.encode(texts, add_special_tokens), strict=True)
        ]
    except Exception as error:  # noqa: BLE001  # a young library can fail in any way
        return None, str(error) if isinstance(error, UnusableError) else f"nanotoken raised {type(error).__name__}"
    if different := sum(a.size != b.size or not np.array_equal(a.ids, b.ids) for a, b in pairs):
        return None, f"nanotoken gives other ids for {different} of {len(texts)} texts"
    return found, f"its ids are those of tokenizers for {len(texts)} texts"


def guarded(encode: Callable[[], T]) -> T:
    """Return `encode()`. Raises `RuntimeError` for a panic of a library in Rust.

    A panic is not an `Exception`. It would end a thread and leave a request without a response.
    """
    try:
        return encode()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizer panicked: {error}") from error


def hard_texts(special: Sequence[str], longest: int) -> Iterator[str]:
    """Yield texts in which tokenizers differ, always the same ones: a few hundred.

    `special`: the special tokens. `longest`: tokens that the model accepts.
    """
    random_ = random.Random(1)

    def drawn(first: int, last: int) -> str:
        letters = (chr(random_.randint(first, last)) for _ in range(random_.randint(1, _LONGEST)))
        return "".join(letter for letter in letters if not "\ud800" <= letter <= "\udfff")

    words = [drawn(*block) for block in _BLOCKS for _ in range(_TEXTS_PER_BLOCK)]
    yield from words
    for form in ("NFC", "NFD", "NFKD"):
        yield from (other for word in words if (other := unicodedata.normalize(form, word)) != word)
    parts = [*words, *special, *map(str.lower, special), " ", "\n", "\t", "\u00a0", "\u200b", "e\u0301", "##s", "don't"]
    for _ in range(8 * _TEXTS_PER_BLOCK):
        yield random_.choice(("", " ")).join(random_.choices(parts, k=random_.randint(2, 8)))
    for token in special:
        yield from (token, f"a{token}b", f" {token} ", f"{token}{token}", token.lower(), token[:-1], f"{token}\u0301")
    for length in (99, 100, 101, 199, 200, 201, 1000):
        yield from ("x" * length, "é" * length, "\u0301" * length, "." * length, "北" * length, f"a {'z' * length} b")
    yield from (
        "",
        " ",
        "\x00",
        "\ufffd",
        "\ufeff",
        "\u0345",
        "ΑΣ Σ",
        "İI ıi",
        "ﬁ ﷺ ẞß",
        "👨\u200d👩\u200d👧",
        "👍🏽",
        "á b́",
    )
    for part in ("word ", "北", *special[:1]):
        yield from (part * (longest - 2), part * (longest + 1))
