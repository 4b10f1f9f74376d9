"""Texts to token ids: truncated like the tokenizer does, in a time that does not grow with the truncated part."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from inferctl.serve import embedding_config, tokenizer_pool
from inferctl.serve.tokenizer_pool import InputError, TokenizerPool

LIMIT = 16
WORDS = st.sampled_from(
    ["a", "river", "unbelievably", "北京", "naïve", "🚀", "x" * 200, " " * 300, "\n", "-", "e\u0301"]
)


@pytest.fixture(scope="module", params=["words", "whole texts"])
def pool(minilm: Path, request: pytest.FixtureRequest) -> TokenizerPool:
    """A pool with a word cache, and one without, as for a tokenizer that does not work word by word."""
    pool = TokenizerPool(minilm, embedding_config.read(minilm, LIMIT))
    assert pool._words is not None
    if request.param != "words":
        pool._words = None
    return pool


@pytest.fixture(scope="module")
def whole(minilm: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LIMIT)
    return tokenizer


@given(st.lists(st.lists(WORDS, min_size=1, max_size=200).map(" ".join), min_size=1, max_size=4))
@settings(max_examples=60)
@example([" " * 5000 + "river", "x" * 5000 + " river", "北" * 5000, "river" + "\n" * 5000 + "river"])
def test_long_texts_are_truncated_like_the_tokenizer_does(
    pool: TokenizerPool, whole: Tokenizer, texts: list[str]
) -> None:
    rows = pool.encode_now(texts, truncate=True)
    for text, row in zip(texts, rows, strict=True):
        encoding = whole.encode(text)
        assert row.tolist() == encoding.ids
        if encoding.overflowing:
            with pytest.raises(InputError):
                pool.encode_now([text], truncate=False)
        else:
            assert pool.encode_now([text], truncate=False)[0].tolist() == encoding.ids


def test_only_the_start_of_a_huge_text_is_tokenized(pool: TokenizerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Counting:
        def __init__(self, inner: Tokenizer) -> None:
            self._inner = inner

        def encode(self, text: str) -> object:
            seen.append(len(text))
            return self._inner.encode(text)

        def encode_batch_fast(self, texts: list[str], **options: bool) -> object:
            seen.extend(map(len, texts))
            return self._inner.encode_batch_fast(texts, **options)

    tokenizer = pool._tokenizer()
    monkeypatch.setattr(pool, "_tokenizer", lambda: Counting(tokenizer))
    assert len(pool.encode_now(["word " * 2_000_000], truncate=True)[0]) == LIMIT
    assert sum(seen) <= tokenizer_pool._CHARACTERS_PER_TOKEN * LIMIT


def test_the_index_of_a_long_text_is_right_after_the_first_batch(pool: TokenizerPool) -> None:
    texts = ["short"] * 150 + ["word " * 50]
    with pytest.raises(InputError) as rejected:
        pool.encode_now(texts, truncate=False)
    assert rejected.value.index == 150
    assert len(pool.encode_now(texts, truncate=True)) == 151


def test_a_text_without_any_token_is_rejected(minilm: Path, tmp_path: Path) -> None:
    bare = json.loads((minilm / "tokenizer.json").read_text())
    bare["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    pool = TokenizerPool(tmp_path, embedding_config.read(minilm))
    with pytest.raises(InputError) as rejected:
        pool.encode_now(["a text", " \u0000 "], truncate=True)
    assert rejected.value.code == "empty_input"
    assert "input[1]" in str(rejected.value)


@pytest.mark.parametrize("character", ["x", " "])
def test_a_huge_text_without_words_is_rejected(pool: TokenizerPool, character: str) -> None:
    with pytest.raises(InputError) as rejected:
        pool.encode_now(["a", character * 8_000_000], truncate=True)
    assert rejected.value.code == "text_too_long"
    assert "input[1]" in str(rejected.value)


def together(pool: TokenizerPool, *requests: list[str]) -> list[object]:
    """Return the results or errors of requests that arrive at the same time."""

    async def ask() -> list[object]:
        calls = (pool.encode(texts, truncate=False) for texts in requests)
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)

    return asyncio.run(ask())


def test_small_requests_that_arrive_together_get_their_own_tokens_and_errors(pool: TokenizerPool) -> None:
    requests = [[f"text {i}", "river"][: 1 + i % 2] for i in range(150)]
    requests[7] = ["word " * 50]
    found = together(pool, *requests)
    assert isinstance(found[7], InputError)
    for texts, rows in zip(requests, found, strict=True):
        if rows is not found[7]:
            expected = [row.tolist() for row in pool.encode_now(texts, truncate=True)]
            assert [row.tolist() for row in rows] == expected  # type: ignore[attr-defined]


def test_requests_complete_next_to_a_request_with_a_full_batch_of_texts(pool: TokenizerPool) -> None:
    many, one, last = together(pool, ["text"] * tokenizer_pool._BATCH_TEXTS, ["one"], ["another"])
    assert (len(many), len(one), len(last)) == (tokenizer_pool._BATCH_TEXTS, 1, 1)  # type: ignore[arg-type]


def test_texts_with_few_new_words_do_not_wait_for_a_thread(minilm: Path) -> None:
    pool = TokenizerPool(minilm, embedding_config.read(minilm))
    released = threading.Event()
    pool._small_executor.submit(released.wait)

    async def ask() -> tuple[bool, bool]:
        cheap = [asyncio.ensure_future(pool.encode([f"The river runs {i} {i}."], truncate=True)) for i in range(4)]
        costly = [asyncio.ensure_future(pool.encode(["北" * 200 + str(i)], truncate=True)) for i in range(2)]
        costly.append(asyncio.ensure_future(pool.encode(["a"] * (tokenizer_pool._BATCH_TEXTS + 1), truncate=True)))
        try:
            await asyncio.wait_for(asyncio.gather(*cheap), 30)
            await asyncio.sleep(0.2)
            return True, not any(task.done() for task in costly)
        finally:
            released.set()
            await asyncio.wait_for(asyncio.gather(*costly), 30)

    try:
        assert asyncio.run(ask()) == (True, True)
    finally:
        released.set()


@pytest.mark.parametrize("words", [3, 300])
def test_a_text_has_equal_tokens_before_and_after_its_words_are_cached(
    minilm: Path, whole: Tokenizer, words: int
) -> None:
    pool = TokenizerPool(minilm, embedding_config.read(minilm, LIMIT))
    text = " ".join(f"Word{i}," for i in range(words))
    for _ in range(2 * tokenizer_pool._CACHED_SHARE):
        assert pool.encode_now([text, text], truncate=True)[1].tolist() == whole.encode(text).ids
    assert pool._words is not None
    assert pool._words.unknown([tokenizer_pool._head(text, pool._longest)]) == []


def test_small_requests_do_not_wait_for_large_ones(pool: TokenizerPool) -> None:
    released = threading.Event()

    async def ask() -> None:
        await asyncio.wait_for(asyncio.gather(*(pool.encode([f"text {i}"], truncate=True) for i in range(4))), 30)

    for _ in range(pool._threads):
        pool._large_executor.submit(released.wait)
    try:
        asyncio.run(ask())
    finally:
        released.set()


class PanicException(BaseException):  # the name that the Rust library uses
    """A panic of the library."""


@pytest.mark.parametrize("method", ["encode", "encode_batch_fast"])
@pytest.mark.parametrize("size", [1, 300])
@pytest.mark.parametrize("words", [True, False])
def test_a_panic_fails_only_its_request(
    minilm: Path, monkeypatch: pytest.MonkeyPatch, method: str, size: int, words: bool
) -> None:
    pool = TokenizerPool(minilm, embedding_config.read(minilm, LIMIT))
    if not words:
        pool._words = None

    class Panicking:
        def __init__(self, inner: Tokenizer) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> object:
            call = getattr(self._inner, name)

            def panic(given: list[str] | str, **options: bool) -> object:
                if name == method and "panic" in str(given):
                    raise PanicException("index out of bounds")
                return call(given, **options)

            return panic

    inner, blank = pool._tokenizer(), " " * (tokenizer_pool._CHARACTERS_PER_TOKEN * LIMIT)
    monkeypatch.setattr(pool, "_tokenizer", lambda: Panicking(inner))
    requests = [["a text"], [f"panic {blank} panic"] * size, ["another"]]
    for requested, found in zip(requests, together(pool, *requests), strict=True):
        assert isinstance(found, RuntimeError) == (len(requested[0]) > 100), found


@pytest.mark.parametrize("requests", [[["z"]], [["ab"], ["z"], ["ba"]]])
def test_an_error_of_the_tokenizer_fails_only_its_request(
    minilm: Path, tmp_path: Path, requests: list[list[str]]
) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], "unk_token": "nothing", "fuse_unk": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    pool = TokenizerPool(tmp_path, embedding_config.read(minilm))
    for texts, found in zip(requests, together(pool, *requests), strict=True):
        assert isinstance(found, Exception) == (texts == ["z"]), found


def test_a_cancelled_request_does_not_affect_others(pool: TokenizerPool) -> None:
    async def ask() -> object:
        # A very long word, which is never cached, so it waits for a thread.
        tasks = [asyncio.ensure_future(pool.encode(["x" * 200 + str(i)], truncate=True)) for i in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)

    first, cancelled, last = asyncio.run(ask())  # type: ignore[misc]
    assert isinstance(cancelled, asyncio.CancelledError)
    assert len(first) == len(last) == 1
