"""Texts to token ids: truncated like the tokenizer does, in a time that does not grow with the truncated part."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from inferctl.batching.fairness import Shares
from inferctl.reading import embedding_config
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.serve.text import text_parts, tokenizer_pool
from inferctl.serve.text.text_parts import InputError
from inferctl.serve.text.tokenizer_pool import TokenizerBusyError, TokenizerPool, TokenizerShareError

LIMIT = 16
WORDS = st.sampled_from(
    ["a", "river", "unbelievably", "北京", "naïve", "🚀", "x" * 200, " " * 300, "\n", "-", "e\u0301"]
)


@pytest.fixture(scope="module", params=["nanotoken", "tokenizers"])
def pool(minilm: Path, request: pytest.FixtureRequest) -> Iterator[TokenizerPool]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tokenizers":
            patch.setitem(sys.modules, "nanotoken", None)
        pool = TokenizerPool(minilm, embedding_config.read(minilm, LIMIT))
    assert pool.library["library"].startswith(request.param)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def whole(minilm: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LIMIT)
    return tokenizer


@pytest.fixture
def tokenized(pool: TokenizerPool, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The texts that the library gets, each with the name of the thread."""
    seen: list[tuple[str, str]] = []
    encode = pool._encode

    def spy(texts: list[str], special: bool) -> object:
        seen.extend((text, threading.current_thread().name) for text in texts)
        return encode(texts, special)

    monkeypatch.setattr(pool, "_encode", spy)
    return seen


def results(pool: TokenizerPool, *requests: list[str]) -> list[object]:
    """Return the results or errors of requests that arrive at the same time."""

    async def ask() -> list[object]:
        calls = (pool.encode(texts, truncate=False) for texts in requests)
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)

    return asyncio.run(ask())


@given(st.lists(st.lists(WORDS, min_size=1, max_size=400).map(" ".join), min_size=1, max_size=4))
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


@given(st.lists(st.lists(WORDS, max_size=40).map(" ".join), min_size=1, max_size=4), st.sampled_from(["", "query: "]))
@settings(max_examples=60)
def test_long_texts_lose_their_start_like_in_the_tokenizer(
    pool: TokenizerPool, minilm: Path, texts: list[str], prompt: str
) -> None:
    oracle = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    oracle.no_padding()
    oracle.enable_truncation(LIMIT, direction="left")
    rows = pool.encode_now(texts, truncate=True, prompt=prompt, left=True)
    encodings = [oracle.encode(prompt + text) for text in texts]
    assert [row.tolist() for row in rows] == [encoding.ids for encoding in encodings]
    for text, encoding in zip(texts, encodings, strict=True):
        if encoding.overflowing:
            with pytest.raises(InputError):
                pool.encode_now([text], truncate=False, prompt=prompt, left=True)
    oracle.enable_truncation(LIMIT)  # other texts still lose their end
    assert pool.encode_now(texts, truncate=True)[0].tolist() == oracle.encode(texts[0]).ids


@pytest.mark.parametrize("special", [True, False])
def test_tokens_have_their_places_in_the_whole_text(pool: TokenizerPool, minilm: Path, special: bool) -> None:
    oracle = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    oracle.no_padding()
    oracle.no_truncation()
    texts = ["", "Unbelievably naïve 北京 🚀", "[SEP] word " * 40, " " * 300 + "x" * 200]
    found = asyncio.run(pool.tokens(texts, add_special_tokens=special, prompt="q: "))
    for text, row in zip(texts, found, strict=True):
        encoding = oracle.encode("q: " + text, add_special_tokens=special)
        assert [token.id for token in row] == encoding.ids
        for token, name, masked, (start, stop) in zip(
            row, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
        ):
            expected = (name, True, None, None) if masked else (("q: " + text)[start:stop], False, start, stop)
            assert (token.text, token.special, token.start, token.stop) == expected
    assert len(pool.encode_now(["word " * 99], truncate=True)[0]) == LIMIT  # it still truncates texts of requests
    for call in (
        pool.tokens(["a" * 200_000] * 2, add_special_tokens=special),
        pool.encode(["a" * 300_000], truncate=True, left=True),
    ):
        with pytest.raises(InputError, match="the limit is 250000"):
            asyncio.run(call)


def test_only_the_start_of_a_huge_text_is_tokenized(pool: TokenizerPool, tokenized: list[tuple[str, str]]) -> None:
    assert len(pool.encode_now(["word " * 2_000_000], truncate=True)[0]) == LIMIT
    assert sum(len(text) for text, _ in tokenized) <= text_parts.MIN_HEAD


def test_long_texts_are_not_all_tokenized_in_one_call(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, sizes = TokenizerPool(minilm, EmbeddingConfig(("mean",), 8192)), []
    encode = pool._encode

    def spy(texts: list[str], special: bool) -> object:
        sizes.append(sum(map(len, texts)))
        return encode(texts, special)

    monkeypatch.setattr(pool, "_encode", spy)
    assert len(pool.encode_now(["." * 70_000] * 10, truncate=True)) == 10
    assert max(sizes) <= tokenizer_pool._BATCH_CHARACTERS


@pytest.mark.parametrize("character", ["x", " "])
def test_a_huge_text_without_words_is_rejected(
    pool: TokenizerPool, tokenized: list[tuple[str, str]], character: str
) -> None:
    with pytest.raises(InputError, match=r"input\[1\] is too long") as rejected:
        pool.encode_now(["a", character * 8_000_000], truncate=True)
    assert (str(rejected.value).split()[0], rejected.value.code) == ("input[1]", "text_too_long")
    assert max(len(text) for text, _ in tokenized) <= text_parts.MAX_HEAD


def test_the_index_of_a_long_text_is_right_after_the_first_batch(pool: TokenizerPool) -> None:
    texts = ["short"] * 650 + ["word " * 50]
    with pytest.raises(InputError) as rejected:
        pool.encode_now(texts, truncate=False)
    assert (str(rejected.value).split()[0], rejected.value.code) == ("input[650]", "context_length_exceeded")
    assert len(pool.encode_now(texts, truncate=True)) == 651


def test_a_text_without_any_token_is_rejected(minilm: Path, tmp_path: Path) -> None:
    bare = json.loads((minilm / "tokenizer.json").read_text())
    bare["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    pool = TokenizerPool(tmp_path, embedding_config.read(minilm))
    with pytest.raises(InputError, match=r"input\[1\] has no tokens") as rejected:
        pool.encode_now(["a text", " \u0000 "], truncate=True)
    assert (str(rejected.value).split()[0], rejected.value.code) == ("input[1]", "empty_input")


def test_token_ids_are_truncated_too(pool: TokenizerPool) -> None:
    ids = [[1, 2], list(range(LIMIT + 5))]
    assert [row.tolist() for row in pool.truncate(ids, truncate=True)] == [[1, 2], list(range(LIMIT))]
    with pytest.raises(InputError) as rejected:
        pool.truncate(ids, truncate=False)
    assert (str(rejected.value).split()[0], rejected.value.code) == ("input[1]", "context_length_exceeded")


@pytest.mark.parametrize(
    ("texts", "inline"),
    [
        (["word " * 190], True),
        (["word " * 200], False),
        (["a"] * 24, True),
        (["a"] * 25, False),  # each text has a fixed cost
    ],
)
def test_only_small_requests_are_tokenized_on_the_event_loop(
    pool: TokenizerPool, tokenized: list[tuple[str, str]], texts: list[str], inline: bool
) -> None:
    scale = 20 if pool.library["library"].startswith("nanotoken") else 1
    texts = texts * scale if len(texts) > 1 else [texts[0] * scale]
    asyncio.run(pool.encode(texts, truncate=True))
    assert {thread == threading.current_thread().name for _, thread in tokenized} == {inline}


def test_small_requests_do_not_wait_for_large_ones(pool: TokenizerPool) -> None:
    released = threading.Event()
    for _ in range(pool.threads[1]):
        pool._executor.submit(released.wait)
    try:
        assert len(results(pool, ["a text"], ["another"])) == 2
    finally:
        released.set()


def test_requests_take_turns_on_the_threads(pool: TokenizerPool) -> None:
    """A request in many slices does not delay a later one until its end."""

    async def run() -> list[str]:
        done: list[str] = []

        async def encode(name: str, texts: list[str]) -> None:
            await pool.encode(texts, truncate=True)
            done.append(name)

        large = ["word " * 60_000] * 10
        await asyncio.gather(*(encode("large", large) for _ in range(1)), encode("medium", ["word " * 4_500]))
        return done

    assert asyncio.run(run()) == ["medium", "large"]


async def test_too_many_waiting_characters_are_rejected(pool: TokenizerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_pool, "_MAX_WAITING_CHARACTERS", 10_000)
    first = asyncio.create_task(pool.encode(["word " * 10_000], truncate=True))  # alone, any size is accepted
    await asyncio.sleep(0)
    with pytest.raises(TokenizerBusyError):
        await pool.encode(["word " * 4_500], truncate=True)
    assert len(await pool.encode(["small"], truncate=True)) == 1
    await first
    assert len(await pool.encode(["word " * 4_500], truncate=True)) == 1


async def test_a_tenant_leaves_room_for_the_others(pool: TokenizerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_shares", Shares(200_000))
    first = asyncio.create_task(pool.encode(["word " * 32_000], truncate=True, tenant="a"))
    await asyncio.sleep(0)
    with pytest.raises(TokenizerShareError):
        await pool.encode(["word " * 4_500], truncate=True, tenant="a")
    assert len(await pool.encode(["word " * 4_500], truncate=True, tenant="b")) == 1
    await first
    assert len(await pool.encode(["word " * 4_500], truncate=True, tenant="a")) == 1


def test_a_cancelled_request_is_not_tokenized_further(pool: TokenizerPool, tokenized: list[tuple[str, str]]) -> None:
    async def run() -> None:
        task = asyncio.create_task(pool.encode([f"{i} " + "word " * 60_000 for i in range(50)], truncate=True))
        while not tokenized:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await pool.encode(["word " * 4_500], truncate=True)

    asyncio.run(run())
    assert len(tokenized) < 10
    assert pool._waiting == 0


def test_requests_on_several_threads_get_their_own_tokens(pool: TokenizerPool, whole: Tokenizer) -> None:
    requests = [[f"number {i} {j}" for j in range(1 + 160 * (i % 4))] for i in range(60)]
    for texts, rows in zip(requests, results(pool, *requests), strict=True):
        found = [row.tolist() for row in rows]  # type: ignore[attr-defined]
        assert found == [whole.encode(text).ids for text in texts]


class PanicException(BaseException):  # the name that the Rust library uses
    """A panic of the library."""


@pytest.mark.parametrize("size", [1, 300])
def test_a_panic_fails_only_its_request(minilm: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setitem(sys.modules, "nanotoken", None)
    pool = TokenizerPool(minilm, embedding_config.read(minilm, LIMIT))

    class Panicking:
        def __init__(self, inner: Tokenizer) -> None:
            self._inner = inner

        def encode_batch_fast(self, texts: list[str], **options: bool) -> object:
            if any("panic" in text for text in texts):
                raise PanicException("index out of bounds")
            return self._inner.encode_batch_fast(texts, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    tokenizer = pool.own_tokenizer
    monkeypatch.setattr(pool, "own_tokenizer", lambda: Panicking(tokenizer()))
    first, panicked, last = results(pool, ["a text"], ["panic"] * size, ["another"])
    assert isinstance(panicked, RuntimeError)
    assert "panicked: index out of bounds" in str(panicked)
    assert len(first) == len(last) == 1  # type: ignore[arg-type]
