"""Turns texts into token ids with the model's own `tokenizer.json`.

Each thread has its own tokenizer, because the library does not allow two threads to use one at the same time.
"""

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
from inferctl.serve.embedding_config import EmbeddingConfig
from inferctl.serve.engine_process.engine_protocol import Tokens
from inferctl.serve.words import Row, Words, without_panic

# Requests up to this many characters are tokenized together, because a switch to another thread takes as long as
# tokenizing one of them.
_SMALL_CHARACTERS = 2_000
# A small request with at most this many new words is tokenized at once, on the event loop.
_MAX_NEW_WORDS = 8
# A text that is tokenized as a whole adds one in this many of its words to the cache. To tokenize all of its words
# separately would take two to four times as long as the text.
_CACHED_SHARE = 8
# The most texts per call of the tokenizer, which keeps truncated tokens in memory until the call ends.
_BATCH_TEXTS = 64
# A text is first tokenized up to this many characters per token that the model accepts. To tokenize 30 MiB of words
# would take 20 s and 5 GB, for 256 tokens.
_CHARACTERS_PER_TOKEN = 16
# Executors start a thread only if none is idle. So each warm-up task waits up to this long (s) for the others.
_WARM_UP_TIMEOUT_S = 60.0
# A text that has not enough tokens in this many characters is blanks or one very long word. It is rejected.
_MAX_HEAD = 1_000_000


class InputError(Exception):
    """Input `index` cannot be tokenized. `code` is stable, the message is for the client."""

    def __init__(self, index: int, code: str, message: str) -> None:
        super().__init__(f"input[{index}] {message}")
        self.index, self.code = index, code


def _too_long(index: int, limit: int) -> InputError:
    message = f"has more than {limit} tokens; set `truncate` to true to shorten it"
    return InputError(index, "context_length_exceeded", message)


Outcome: TypeAlias = list[Tokens] | Exception


@dataclass(frozen=True)
class _SmallRequest:
    """A request that shares a call of the tokenizer with others."""

    texts: Sequence[str]
    truncate: bool
    done: asyncio.Future[list[Tokens]]


class TokenizerPool:
    """Tokenizes requests on three kinds of threads.

    Large requests run on `threads` threads. Small requests with new words that arrive together share one more thread.
    Other small requests run on the caller's thread.
    """

    def __init__(
        self,
        folder: Path,
        config: EmbeddingConfig,
        threads: int = 2,
        on_truncated: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Raises `UsageError` if the folder has no usable `tokenizer.json`.

        `on_truncated` gets the number of truncated inputs of a request, on any thread.
        """
        self._on_truncated = on_truncated
        self._file, self._config = folder / "tokenizer.json", config
        if not self._file.is_file():
            raise UsageError(
                f"{folder} has no tokenizer.json",
                "write one with transformers: `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`",
            )
        self._longest = _CHARACTERS_PER_TOKEN * config.max_tokens
        self._small: deque[_SmallRequest] = deque()
        self._scheduled = False  # `_encode_queued` will run in this turn of the event loop
        self._busy = False  # the thread for small requests is in use
        self._local = threading.local()
        # Small requests have their own thread, so that they do not wait for large ones.
        self._small_executor = ThreadPoolExecutor(1, "tokenize-small")
        self._threads, self._large_executor = threads, ThreadPoolExecutor(threads, "tokenize")
        # None if the tokens of a text are not those of its words. The tokenizer then gets whole texts.
        self._words = Words.of(self._tokenizer(), config.max_tokens)
        self.vocabulary_size = self._tokenizer().get_vocab_size(with_added_tokens=True)

    def warm(self) -> None:
        """Start to load each thread's tokenizer, so that no request waits for it and memory use does not grow later."""
        barrier = threading.Barrier(self._threads)
        for _ in range(self._threads):
            self._large_executor.submit(lambda: (self._tokenizer(), barrier.wait(_WARM_UP_TIMEOUT_S)))
        self._small_executor.submit(self._tokenizer)

    async def encode(self, texts: Sequence[str], *, truncate: bool) -> list[Tokens]:
        """Return the token ids (int32) of each text.

        Raises `InputError` for a long text without `truncate`, and for a text without any token.
        """
        loop = asyncio.get_running_loop()
        if sum(map(len, texts)) + len(texts) * len(self._config.prompt) > _SMALL_CHARACTERS:
            call = partial(self.encode_now, texts, truncate=truncate)
            return await loop.run_in_executor(self._large_executor, call)
        if (rows := self._encode_at_once(texts, truncate)) is not None:
            return rows
        request = _SmallRequest(texts, truncate, loop.create_future())
        self._small.append(request)
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._encode_queued)
        return await request.done

    def encode_now(self, texts: Sequence[str], *, truncate: bool) -> list[Tokens]:
        """Do what `encode` does, on the calling thread."""
        rows = []
        for start in range(0, len(texts), _BATCH_TEXTS):
            part = self._prepared(texts[start : start + _BATCH_TEXTS])
            rows += self._rows(part, self._heads(part), start, truncate)
        return rows

    def _encode_at_once(self, texts: Sequence[str], truncate: bool) -> list[Tokens] | None:
        """Do what `encode` does if all words, or all but a few, are cached; else return None."""
        words = self._words
        if words is None or len(texts) > _BATCH_TEXTS:
            return None
        texts = self._prepared(texts)
        if any(len(text) > self._longest for text in texts):
            return None
        found = words.rows(texts)
        if missing := [text for text in texts if text not in found]:
            if len(unknown := words.unknown(missing)) > _MAX_NEW_WORDS:
                return None
            words.learn(unknown, self._tokenize_words)
            found |= words.rows(missing)
            if any(text not in found for text in missing):
                return None
        return self._rows(texts, [found[text] for text in texts], 0, truncate)

    def _encode_queued(self) -> None:
        """Tokenize the queued small requests: a single one on this thread, several together on another thread.

        The switch to another thread then costs each of them little.
        """
        self._scheduled = False
        if self._busy or not self._small:
            return
        requests = self._take()
        if len(requests) == 1 and not self._small and len(requests[0].texts) <= _BATCH_TEXTS:
            _set_outcomes(requests, self._encode_small(requests))
            return
        self._busy = True
        job = asyncio.get_running_loop().run_in_executor(self._small_executor, self._encode_small, requests)
        job.add_done_callback(lambda done: self._small_done(requests, done))

    def _take(self) -> list[_SmallRequest]:
        """Remove the next requests and return them: at least one, and about `_BATCH_TEXTS` texts."""
        requests, texts = [self._small.popleft()], 0
        while self._small and (texts := texts + len(requests[-1].texts)) < _BATCH_TEXTS:
            requests.append(self._small.popleft())
        return requests

    def _small_done(self, requests: list[_SmallRequest], done: asyncio.Future[list[Outcome]]) -> None:
        self._busy = False
        _set_outcomes(requests, done.result())
        self._encode_queued()

    def _encode_small(self, requests: list[_SmallRequest]) -> list[Outcome]:
        """Return the token ids or the error of each request. An error of one request does not affect the others."""
        texts = [self._prepared(request.texts) for request in requests]
        try:
            heads = iter(self._heads([text for part in texts for text in part]))
        except Exception as error:  # noqa: BLE001
            return [error] if len(requests) == 1 else [self._encode_small([request])[0] for request in requests]
        outcomes: list[Outcome] = []
        for request, part in zip(requests, texts, strict=True):
            rows = list(islice(heads, len(part)))
            try:
                outcomes.append(self._rows(part, rows, 0, request.truncate))
            except Exception as error:  # noqa: BLE001
                outcomes.append(error)
        return outcomes

    def _prepared(self, texts: Sequence[str]) -> list[str]:
        """Return the texts with the model's prompt, in lower case if the model needs it."""
        config = self._config
        return [(config.prompt + text).lower() if config.lower_case else config.prompt + text for text in texts]

    def _heads(self, texts: Sequence[str]) -> list[Row]:
        """Return the row of the first `_longest` characters of each text."""
        heads = [_head(text, self._longest) for text in texts]
        if (words := self._words) is None:
            return self._whole(heads)
        found = words.rows(heads)
        if missing := [head for head in heads if head not in found]:
            size = sum(head.count(" ") + 1 for head in missing)
            words.learn(words.unknown(missing)[: size // _CACHED_SHARE + 1], self._tokenize_words)
            found |= words.rows(missing)
            rest = [head for head in missing if head not in found]
            found |= zip(rest, self._whole(rest), strict=True)
        return [found[head] for head in heads]

    def _whole(self, texts: list[str]) -> list[Row]:
        # `encode_batch_fast` computes no offsets and takes a fifth of the time, also for a single text.
        return [_row(encoding) for encoding in without_panic(self._tokenizer().encode_batch_fast, texts)]

    def _tokenize_words(self, words: list[str]) -> Sequence[Encoding]:
        encode = partial(self._tokenizer().encode_batch_fast, add_special_tokens=False)
        encodings: Sequence[Encoding] = without_panic(encode, words)
        return encodings

    def _rows(self, texts: Sequence[str], heads: Sequence[Row], first: int, truncate: bool) -> list[Tokens]:
        """Return the token ids of each text, from the rows of the heads. Raises `InputError` and `ApiError`.

        A truncated head has all the tokens of its text that matter. Other long texts are tokenized further.
        `first`: the index of the first text in its request.
        """
        rows, truncated = [], 0
        for index, (text, head) in enumerate(zip(texts, heads, strict=True), first):
            ids, more = head if len(text) <= self._longest else self._tokenize_further(text, head, index)
            if more and not truncate:
                raise _too_long(index, self._config.max_tokens)
            if not len(ids):
                raise InputError(index, "empty_input", "has no tokens")
            rows.append(ids)
            truncated += more
        if truncated:
            self._on_truncated(truncated)
        return rows

    def _tokenize_further(self, text: str, row: Row, index: int) -> Row:
        """Tokenize longer and longer heads of a text until there are too many tokens or the text ends.

        Returns the last row. Raises `ApiError` 400 for a text with very few tokens for its length.
        """
        tokenizer, size = self._tokenizer(), len(_head(text, self._longest))
        while size < len(text) and not row[1]:
            if size >= max(_MAX_HEAD, self._longest):
                message = f"is too long: {len(text)} characters with very few tokens"
                raise InputError(index, "text_too_long", message)
            head = _head(text, 4 * size)
            row, size = _row(without_panic(tokenizer.encode, head)), len(head)
        return row

    def truncate(self, ids: Sequence[Sequence[int]], *, truncate: bool) -> list[Tokens]:
        """Return token ids as arrays of at most `max_tokens`. Raises `InputError` unless `truncate`."""
        limit = self._config.max_tokens
        if not truncate and (over := next((i for i, row in enumerate(ids) if len(row) > limit), None)) is not None:
            raise _too_long(over, limit)
        if truncated := sum(len(row) > limit for row in ids):
            self._on_truncated(truncated)
        return [np.array(row[:limit], dtype=np.int32) for row in ids]

    def close(self) -> None:
        """Stop the threads."""
        for executor in (self._small_executor, self._large_executor):
            executor.shutdown(wait=False, cancel_futures=True)

    def _tokenizer(self) -> Tokenizer:
        tokenizer: Tokenizer | None = getattr(self._local, "tokenizer", None)
        if tokenizer is None:
            try:
                tokenizer = Tokenizer.from_file(str(self._file))
            except Exception as error:  # noqa: BLE001  # the library raises bare Exception
                raise UsageError(
                    f"{self._file} cannot be read: {error}", "the download may be incomplete; download the model again"
                ) from None
            tokenizer.no_padding()
            tokenizer.enable_truncation(self._config.max_tokens)
            self._local.tokenizer = tokenizer
        return tokenizer


def _set_outcomes(requests: list[_SmallRequest], outcomes: Sequence[Outcome]) -> None:
    for request, outcome in zip(requests, outcomes, strict=True):
        if request.done.done():  # cancelled
            continue
        if isinstance(outcome, Exception):
            request.done.set_exception(outcome)
        else:
            request.done.set_result(outcome)


def _row(encoding: Encoding) -> Row:
    return np.array(encoding.ids, dtype=np.int32), bool(encoding.overflowing)


def _head(text: str, longest: int) -> str:
    """Return the start of a text: at most `longest` characters, at least half of them, if possible up to a word end."""
    if len(text) <= longest:
        return text
    head = text[:longest]
    end = max(head.rfind(space, longest // 2) for space in " \n\t")
    return head if end < 0 else head[:end]
