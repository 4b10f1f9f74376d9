"""Token ids from cached words equal those of the tokenizer, for every text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Encoding, Tokenizer

from inferctl.serve import words as words_module
from inferctl.serve.words import Words

LIMIT = 12
UNUSUAL = st.sampled_from(
    [
        "[MASK]",
        "[SEP]x",
        "x[CLS]",
        "İstanbul",
        "ΟΔΟΣ",
        "e\u0301",
        "\u0301",
        "\u00ad",
        "\x1c",
        "\x00",
        "\u3000",
        "\u2028",
        "北京",
        "🚀",
        "unbelievably",
        "x" * 120,
        "",
        "\t",
        "don't",
        "3.14",
    ]
)
TEXTS = st.lists(st.one_of(UNUSUAL, st.text(max_size=8)), max_size=20).map(" ".join) | st.text(max_size=60)


def changed(minilm: Path, **parts: Any) -> Tokenizer:
    """Return the model's tokenizer with replaced parts."""
    data = json.loads((minilm / "tokenizer.json").read_text())
    tokenizer = Tokenizer.from_str(json.dumps({**data, **parts}))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LIMIT)
    return tokenizer


def like_bert(minilm: Path) -> dict[str, Tokenizer]:
    cased = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": False,
    }
    mpnet = {
        "type": "RobertaProcessing",
        "cls": ["[CLS]", 101],
        "sep": ["[SEP]", 102],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    bert = {"type": "BertProcessing", "cls": ["[CLS]", 101], "sep": ["[SEP]", 102]}
    added = changed(minilm)
    added.add_tokens(
        [AddedToken("<special>", lstrip=True, rstrip=True, normalized=True), AddedToken("run", single_word=True)]
    )
    return {
        "uncased": changed(minilm),
        "cased": changed(minilm, normalizer=cased),
        "MPNet's": changed(minilm, post_processor=mpnet),
        "BERT's processor": changed(minilm, post_processor=bert),
        "added tokens": added,
    }


def ask(tokenizer: Tokenizer) -> Callable[[list[str]], Sequence[Encoding]]:
    return partial(tokenizer.encode_batch_fast, add_special_tokens=False)


@pytest.fixture(scope="module")
def tokenizers(minilm: Path) -> list[tuple[Tokenizer, Words]]:
    found = [(tokenizer, Words.of(tokenizer, LIMIT)) for tokenizer in like_bert(minilm).values()]
    assert all(words is not None for _, words in found)
    return found  # type: ignore[return-value]


@given(st.lists(TEXTS, min_size=1, max_size=4))
@settings(max_examples=200)
@example(["a <special> b", "run rerun run. <SPECIAL>x", "the [MASK]", " ".join("abcdefghij"), " ".join("abcdefghijk")])
def test_every_text_has_the_tokenizers_own_ids(tokenizers: list[tuple[Tokenizer, Words]], texts: list[str]) -> None:
    for tokenizer, words in tokenizers:
        words.learn(words.unknown(texts), ask(tokenizer))
        rows = words.rows(texts)
        for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
            if any(len(word) > words_module._MAX_WORD_LENGTH for word in text.split(" ")):
                assert text not in rows
                continue
            ids, more = rows[text]
            assert ids.tolist() == encoding.ids
            assert more == bool(encoding.overflowing)


def test_learned_words_are_cached(minilm: Path) -> None:
    tokenizer = changed(minilm)
    words = Words.of(tokenizer, LIMIT)
    assert words is not None
    longest, longer = "y" * 64, "z" * 65
    texts = ["swift brook", "swift  swift", f"swift {longest}", f"swift {longer}"]
    assert not words.rows(texts)
    assert sorted(words.unknown(texts)) == ["brook", "swift", longest]
    words.learn(["swift"], ask(tokenizer))
    assert words.rows(texts).keys() == {"swift  swift"}
    words.learn(words.unknown(texts), ask(tokenizer))
    assert words.rows(texts).keys() == set(texts[:3])
    assert words.unknown(texts) == []


def test_the_cache_is_limited(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "_MAX_WORDS", 50)
    tokenizer = changed(minilm)
    words = Words.of(tokenizer, LIMIT)
    assert words is not None
    for first in range(0, 1000, 7):
        text = " ".join(map(str, range(first, first + 7)))
        words.learn(words.unknown([text]), ask(tokenizer))
        assert words.rows([text])[text][0].tolist() == tokenizer.encode(text).ids
        assert len(words._known) <= 50
    words.learn([f"new{i}" for i in range(60)], ask(tokenizer))
    assert len(words._known) == 50


def test_threads_that_empty_and_fill_the_cache_get_the_right_ids(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words.of(changed(minilm), LIMIT)
    assert words is not None
    monkeypatch.setattr(words_module, "_MAX_WORDS", 20)

    def run(offset: int) -> bool:
        tokenizer = changed(minilm)
        for text in (f"{i} {i + 1} river {i * offset}" for i in range(400)):
            words.learn(words.unknown([text]), ask(tokenizer))
            # There is no row if another thread just emptied the cache.
            for row in words.rows([text]).values():
                if row[0].tolist() != tokenizer.encode(text).ids:
                    return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(1, 9)))


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": None},
        {"post_processor": None},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "a"}},
    ],
    ids=["pre-tokenizer", "normalizer", "no normalizer", "no special tokens", "model"],
)
def test_another_type_of_tokenizer_gets_whole_texts(minilm: Path, parts: dict[str, Any]) -> None:
    if "model" in parts:
        parts = {**parts, "added_tokens": []}
    assert Words.of(changed(minilm, **parts), LIMIT) is None


@pytest.mark.parametrize("content", ["new york", " new", "new "])
def test_an_added_token_with_a_space_needs_whole_texts(minilm: Path, content: str) -> None:
    tokenizer = changed(minilm)
    tokenizer.add_tokens([content])
    assert Words.of(tokenizer, LIMIT) is None


def test_a_tokenizer_that_raises_on_odd_texts_gets_whole_texts(minilm: Path) -> None:
    vocabulary = {"[CLS]": 0, "[SEP]": 1, "a": 2}
    model = {
        "type": "WordPiece",
        "vocab": vocabulary,
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    }
    processor = {"type": "BertProcessing", "cls": ["[CLS]", 0], "sep": ["[SEP]", 1]}
    tokenizer = changed(minilm, model=model, added_tokens=[], post_processor=processor)
    assert len(tokenizer.encode("a a").ids) == 4
    assert Words.of(tokenizer, LIMIT) is None


@pytest.mark.parametrize("limit", [1, 2])
def test_a_limit_that_fits_only_special_tokens_needs_whole_texts(minilm: Path, limit: int) -> None:
    tokenizer = changed(minilm)
    tokenizer.enable_truncation(limit)
    assert Words.of(tokenizer, limit) is None


def test_a_similar_tokenizer_with_other_ids_gets_whole_texts(minilm: Path) -> None:
    tokenizer = changed(minilm)
    tokenizer.enable_truncation(LIMIT, direction="left")
    assert Words.of(tokenizer, LIMIT) is None
