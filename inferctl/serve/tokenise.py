"""Text -> token ids, with the model's own `tokenizer.json`. One tokenizer per thread: they cannot be shared while borrowed."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
from tokenizers import Encoding, Tokenizer

from inferctl.errors import UsageError
from inferctl.serve.http import ApiError
from inferctl.serve.recipe import Recipe
from inferctl.serve.types import Tokens
from inferctl.serve.words import Row, Words, without_panic

# Requests up to this many characters are tokenised together: a hop to another thread costs as much as tokenising one.
_SMALL_CHARACTERS = 2_000
# A small request with no more new words is tokenised at once, on the event loop.
_FEW_WORDS = 8
# A text that is tokenised whole teaches an eighth of its words: asked for one by one, all of them would take two to four times as long as the text.
_LEARNT = 8
# Texts tokenised in one call: what is cut off is held until the call ends.
_TOGETHER = 64
# A text is tokenised up to this many characters a token first: 30 MiB of words would cost 20 s and 5 GB, to keep 256 tokens of them.
_CHARACTERS_PER_TOKEN = 16
# Threads start one by one as long as none is idle: each waits this long (seconds) for the others to have started.
_WARM_SECONDS = 60.0
# Where so much of a text still does not fill the model it is blanks or one endless word: refused rather than read to its end.
_LONGEST_HEAD = 1_000_000


class TooLongError(Exception):
    """Input `index` has more than `limit` tokens and may not be cut."""

    def __init__(self, index: int, limit: int) -> None:
        super().__init__(f"input {index} is longer than {limit} tokens")
        self.index, self.limit = index, limit


Outcome: TypeAlias = list[Tokens] | Exception


@dataclass(frozen=True)
class _Small:
    """A request that shares a call."""

    texts: Sequence[str]
    truncate: bool
    done: asyncio.Future[list[Tokens]]


class TokenizerPool:
    """Tokenises large requests on `threads` threads, small ones with new words that come together on one of their own, other small ones on the caller's."""

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
        self._longest = _CHARACTERS_PER_TOKEN * recipe.max_tokens
        self._small: deque[_Small] = deque()
        self._beginning = self._busy = False  # `_begin` is about to be called; a thread has small requests
        self._local = threading.local()
        # Small requests have a thread of their own: behind large ones, two that come together would wait where one alone does not.
        self._for_small = ThreadPoolExecutor(1, "tokenise-small")
        self._threads, self._for_large = threads, ThreadPoolExecutor(threads, "tokenise")
        # None where a text's tokens are not those of its words: the tokenizer then gets whole texts.
        self._words = Words.of(self._tokenizer(), recipe.max_tokens)
        self.vocabulary_size = self._tokenizer().get_vocab_size(with_added_tokens=True)

    def warm(self) -> None:
        """Begin to load each thread's tokenizer, so that no request pays for it and memory is what it will be."""
        together = threading.Barrier(self._threads)
        for _ in range(self._threads):
            self._for_large.submit(lambda: (self._tokenizer(), together.wait(_WARM_SECONDS)))
        self._for_small.submit(self._tokenizer)

    async def encode(self, texts: Sequence[str], *, truncate: bool) -> list[Tokens]:
        """Token ids (int32) of each text. Raises `TooLongError` unless `truncate`, `ApiError` 400 for a text without any token."""
        loop = asyncio.get_running_loop()
        if sum(map(len, texts)) + len(texts) * len(self._recipe.prompt) > _SMALL_CHARACTERS:
            call = lambda: self.encode_now(texts, truncate=truncate)  # noqa: E731  # run_in_executor takes no keyword arguments
            return await loop.run_in_executor(self._for_large, call)
        if (rows := self._encode_at_once(texts, truncate)) is not None:
            return rows
        small = _Small(texts, truncate, loop.create_future())
        self._small.append(small)
        if not self._beginning:
            self._beginning = True
            loop.call_soon(self._begin)
        return await small.done

    def encode_now(self, texts: Sequence[str], *, truncate: bool) -> list[Tokens]:
        """`encode` on the calling thread."""
        rows = []
        for start in range(0, len(texts), _TOGETHER):
            part = self._prepared(texts[start : start + _TOGETHER])
            rows += self._rows(part, self._heads(part), start, truncate)
        return rows

    def _encode_at_once(self, texts: Sequence[str], truncate: bool) -> list[Tokens] | None:
        """`encode` where it costs hardly anything, else None."""
        words = self._words
        if words is None or len(texts) > _TOGETHER:
            return None
        texts = self._prepared(texts)
        if any(len(text) > self._longest for text in texts):
            return None
        found = words.rows(texts)
        if missing := [text for text in texts if text not in found]:
            if len(unknown := words.unknown(missing)) > _FEW_WORDS:
                return None
            words.learn(unknown, self._ask)
            found |= words.rows(missing)
            if any(text not in found for text in missing):
                return None
        return self._rows(texts, [found[text] for text in texts], 0, truncate)

    def _begin(self) -> None:
        """Tokenise the small requests that wait: one alone here, several together on a thread, which then costs each of them little."""
        self._beginning = False
        if self._busy or not self._small:
            return
        together = self._take()
        if len(together) == 1 and not self._small and len(together[0].texts) <= _TOGETHER:
            _hand_out(together, self._encode_small(together))
            return
        self._busy = True
        job = asyncio.get_running_loop().run_in_executor(self._for_small, self._encode_small, together)
        job.add_done_callback(lambda done: self._ended(together, done))

    def _take(self) -> list[_Small]:
        """The requests that are next: as many as hold about so many texts, one at least."""
        together, texts = [self._small.popleft()], 0
        while self._small and (texts := texts + len(together[-1].texts)) < _TOGETHER:
            together.append(self._small.popleft())
        return together

    def _ended(self, together: list[_Small], done: asyncio.Future[list[Outcome]]) -> None:
        self._busy = False
        _hand_out(together, done.result())
        self._begin()

    def _encode_small(self, together: list[_Small]) -> list[Outcome]:
        """What becomes of each request. What goes wrong is the matter of one of them alone."""
        texts = [self._prepared(small.texts) for small in together]
        try:
            heads = iter(self._heads([text for part in texts for text in part]))
        except Exception as error:  # noqa: BLE001
            return [error] if len(together) == 1 else [self._encode_small([small])[0] for small in together]
        found: list[Outcome] = []
        for small, part in zip(together, texts, strict=True):
            mine = list(islice(heads, len(part)))
            try:
                found.append(self._rows(part, mine, 0, small.truncate))
            except Exception as error:  # noqa: BLE001
                found.append(error)
        return found

    def _prepared(self, texts: Sequence[str]) -> list[str]:
        recipe = self._recipe
        return [(recipe.prompt + text).lower() if recipe.lower_case else recipe.prompt + text for text in texts]

    def _heads(self, texts: Sequence[str]) -> list[Row]:
        """What the head of each text comes to."""
        heads = [_head(text, self._longest) for text in texts]
        if (words := self._words) is None:
            return self._whole(heads)
        found = words.rows(heads)
        if missing := [head for head in heads if head not in found]:
            size = sum(head.count(" ") + 1 for head in missing)
            words.learn(words.unknown(missing)[: size // _LEARNT + 1], self._ask)
            found |= words.rows(missing)
            rest = [head for head in missing if head not in found]
            found |= zip(rest, self._whole(rest), strict=True)
        return [found[head] for head in heads]

    def _whole(self, texts: list[str]) -> list[Row]:
        # The fast one computes no offsets: a fifth of the time, for one text as well.
        return [_row(encoding) for encoding in without_panic(self._tokenizer().encode_batch_fast, texts)]

    def _ask(self, words: list[str]) -> Sequence[Encoding]:
        encode = partial(self._tokenizer().encode_batch_fast, add_special_tokens=False)
        found: Sequence[Encoding] = without_panic(encode, words)
        return found

    def _rows(self, texts: Sequence[str], heads: Sequence[Row], first: int, truncate: bool) -> list[Tokens]:
        """Token ids out of those of heads; a head with too many tokens says all about its text, other long texts are read on."""
        rows, cut = [], 0
        for index, (text, head) in enumerate(zip(texts, heads, strict=True), first):
            ids, more = head if len(text) <= self._longest else self._read_on(text, head, index)
            if more and not truncate:
                raise TooLongError(index, self._recipe.max_tokens)
            if not len(ids):
                raise ApiError(400, f"input[{index}] has no token", code="empty_input", param="input")
            rows.append(ids)
            cut += more
        if cut:
            self._on_cut(cut)
        return rows

    def _read_on(self, text: str, row: Row, index: int) -> Row:
        """The row of ever longer heads, until there are too many tokens or the text ends."""
        tokenizer, size = self._tokenizer(), len(_head(text, self._longest))
        while size < len(text) and not row[1]:
            if size >= max(_LONGEST_HEAD, self._longest):
                message = f"input[{index}] is too long: {len(text)} characters that are hardly words"
                raise ApiError(400, message, code="text_too_long", param="input")
            head = _head(text, 4 * size)
            row, size = _row(without_panic(tokenizer.encode, head)), len(head)
        return row

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
        for executor in (self._for_small, self._for_large):
            executor.shutdown(wait=False, cancel_futures=True)

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


def _hand_out(together: list[_Small], found: Sequence[Outcome]) -> None:
    for small, outcome in zip(together, found, strict=True):
        if small.done.done():  # cancelled
            continue
        if isinstance(outcome, Exception):
            small.done.set_exception(outcome)
        else:
            small.done.set_result(outcome)


def _row(encoding: Encoding) -> Row:
    return np.array(encoding.ids, dtype=np.int32), bool(encoding.overflowing)


def _head(text: str, longest: int) -> str:
    """At most `longest` characters of a text and at least half of them, up to the end of a word where there is one."""
    if len(text) <= longest:
        return text
    head = text[:longest]
    end = max(head.rfind(space, longest // 2) for space in " \n\t")
    return head if end < 0 else head[:end]
