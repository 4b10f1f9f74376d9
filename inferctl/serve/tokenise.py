"""Text -> token ids, with the model's own `tokenizer.json`. One tokenizer per thread: they cannot be shared while borrowed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from inferctl.errors import UsageError
from inferctl.serve.http import ApiError
from inferctl.serve.recipe import Recipe
from inferctl.serve.types import Tokens

# Below this many characters a hop to another thread costs more than tokenising.
_INLINE_CHARACTERS = 2_000
# Texts tokenised in one call: what is cut off is held until the call ends.
_TOGETHER = 64
# A text is tokenised up to this many characters a token first: 30 MiB of words would cost 20 s and 5 GB, to keep 256 tokens of them.
_CHARACTERS_PER_TOKEN = 16
# Where so much of a text still does not fill the model it is blanks or one endless word: refused rather than read to its end.
_LONGEST_HEAD = 1_000_000


class TooLongError(Exception):
    """Input `index` has more than `limit` tokens and may not be cut."""

    def __init__(self, index: int, limit: int) -> None:
        super().__init__(f"input {index} is longer than {limit} tokens")
        self.index, self.limit = index, limit


class TokenizerPool:
    """Tokenises on `threads` threads (and short texts on the caller's)."""

    def __init__(
        self, folder: Path, recipe: Recipe, threads: int = 2, on_cut: Callable[[int], None] = lambda _: None
    ) -> None:
        """`on_cut` is told how many inputs of a request were cut, on any thread. Raises `UsageError` when the folder has no usable `tokenizer.json`."""
        self._on_cut = on_cut
        self._file, self._recipe = folder / "tokenizer.json", recipe
        if not self._file.is_file():
            raise UsageError(
                f"{folder} has no tokenizer.json",
                "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` with transformers writes one",
            )
        self._local = threading.local()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokenise")
        self.vocabulary_size = self._tokenizer().get_vocab_size(with_added_tokens=True)

    async def encode(self, texts: Sequence[str], *, truncate: bool) -> list[Tokens]:
        """Token ids (int32) of each text. Raises `TooLongError` unless `truncate`, `ApiError` 400 for a text without any token."""
        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return self.encode_now(texts, truncate=truncate)
        call = lambda: self.encode_now(texts, truncate=truncate)  # noqa: E731  # run_in_executor takes no keyword arguments
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def encode_now(self, texts: Sequence[str], *, truncate: bool) -> list[Tokens]:
        """`encode` on the calling thread."""
        recipe, rows, cut = self._recipe, [], 0
        prepared = [(recipe.prompt + text).lower() if recipe.lower_case else recipe.prompt + text for text in texts]
        for start in range(0, len(prepared), _TOGETHER):
            for index, encoding in enumerate(self._encodings(prepared[start : start + _TOGETHER], start), start):
                if not truncate and encoding.overflowing:
                    raise TooLongError(index, recipe.max_tokens)
                if not encoding.ids:
                    raise ApiError(400, f"input[{index}] has no token", code="empty_input", param="input")
                rows.append(np.array(encoding.ids, dtype=np.int32))
                cut += len(rows[-1]) >= recipe.max_tokens and bool(encoding.overflowing)
        if cut:
            self._on_cut(cut)
        return rows

    def _encodings(self, texts: Sequence[str], first: int) -> list[Encoding]:
        """What the tokenizer makes of each text. A head with too many tokens says all about its text; other long texts are tokenised whole."""
        tokenizer, longest = self._tokenizer(), _CHARACTERS_PER_TOKEN * self._recipe.max_tokens
        heads = [text if len(text) <= longest else _head(text, longest) for text in texts]
        # The fast one computes no offsets: a fifth of the time, for one text as well.
        encodings: list[Encoding] = tokenizer.encode_batch_fast(heads)
        for index, (text, head) in enumerate(zip(texts, heads, strict=True)):
            while len(head) < len(text) and not encodings[index].overflowing:
                if len(head) >= max(_LONGEST_HEAD, longest):
                    message = f"input[{first + index}] is too long: {len(text)} characters that are hardly words"
                    raise ApiError(400, message, code="text_too_long", param="input")
                head = _head(text, 4 * len(head))
                encodings[index] = tokenizer.encode(head)
        return encodings

    def cut(self, ids: Sequence[Sequence[int]], *, truncate: bool) -> list[Tokens]:
        """Ready-made token ids, cut to the longest input. Raises `TooLongError` unless `truncate`."""
        limit = self._recipe.max_tokens
        if not truncate and (over := next((i for i, row in enumerate(ids) if len(row) > limit), None)) is not None:
            raise TooLongError(over, limit)
        if cut := sum(len(row) > limit for row in ids):
            self._on_cut(cut)
        return [np.array(row[:limit], dtype=np.int32) for row in ids]

    def close(self) -> None:
        """Stop the threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _tokenizer(self) -> Tokenizer:
        tokenizer: Tokenizer | None = getattr(self._local, "tokenizer", None)
        if tokenizer is None:
            try:
                tokenizer = Tokenizer.from_file(str(self._file))
            except Exception as error:  # noqa: BLE001  # the library raises bare Exception
                raise UsageError(
                    f"{self._file} cannot be read: {error}", "the download may be incomplete: fetch the model again"
                ) from None
            tokenizer.no_padding()
            tokenizer.enable_truncation(self._recipe.max_tokens)
            self._local.tokenizer = tokenizer
        return tokenizer


def _head(text: str, longest: int) -> str:
    """At most `longest` characters of a text and at least half of them, up to the end of a word where there is one."""
    if len(text) <= longest:
        return text
    head = text[:longest]
    end = max(head.rfind(space, longest // 2) for space in " \n\t")
    return head if end < 0 else head[:end]
