"""Text -> token ids, with the model's own `tokenizer.json`. One tokenizer per thread: they cannot be shared while borrowed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from inferctl.errors import UsageError
from inferctl.serve.recipe import Recipe
from inferctl.serve.types import Tokens

# Below this many characters a hop to another thread costs more than tokenising.
_INLINE_CHARACTERS = 2_000


class TooLongError(Exception):
    """Input `index` has more than `limit` tokens and may not be cut."""

    def __init__(self, index: int, limit: int) -> None:
        super().__init__(f"input {index} is longer than {limit} tokens")
        self.index, self.limit = index, limit


class TokenizerPool:
    """Tokenises on `threads` threads (and short texts on the caller's)."""

    def __init__(self, folder: Path, recipe: Recipe, threads: int = 2) -> None:
        """Raises `UsageError` when the folder has no usable `tokenizer.json`."""
        self._file, self._recipe = folder / "tokenizer.json", recipe
        if not self._file.is_file():
            raise UsageError(
                f"{folder} has no tokenizer.json",
                "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` with transformers writes one",
            )
        self._local = threading.local()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokenise")
        self.vocabulary_size = self._tokenizer().get_vocab_size(with_added_tokens=True)

    @property
    def max_tokens(self) -> int:
        """Tokens of one input at most, special tokens included."""
        return self._recipe.max_tokens

    async def encode(self, texts: Sequence[str], *, truncate: bool) -> list[Tokens]:
        """Token ids (int32) of each text. Raises `TooLongError` unless `truncate`."""
        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return self.encode_now(texts, truncate=truncate)
        call = lambda: self.encode_now(texts, truncate=truncate)  # noqa: E731  # run_in_executor takes no keyword arguments
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def encode_now(self, texts: Sequence[str], *, truncate: bool) -> list[Tokens]:
        """`encode` on the calling thread."""
        tokenizer, recipe = self._tokenizer(), self._recipe
        prepared = [(recipe.prompt + text).lower() if recipe.lower_case else recipe.prompt + text for text in texts]
        encodings = tokenizer.encode_batch_fast(prepared) if len(prepared) > 1 else [tokenizer.encode(prepared[0])]
        if not truncate:
            for index, encoding in enumerate(encodings):
                if encoding.overflowing:
                    raise TooLongError(index, recipe.max_tokens)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def cut(self, ids: Sequence[Sequence[int]], *, truncate: bool) -> list[Tokens]:
        """Ready-made token ids, cut to the longest input. Raises `TooLongError` unless `truncate`."""
        limit = self._recipe.max_tokens
        if not truncate and (over := next((i for i, row in enumerate(ids) if len(row) > limit), None)) is not None:
            raise TooLongError(over, limit)
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
