"""Pairs of texts to token ids: equal to transformers' with the tokenizers of BERT, RoBERTa, XLM-R and ModernBERT."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inferctl.reading import embedding_config
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.prompts import Prompts
from inferctl.serve.text import text_parts
from inferctl.serve.text.text_parts import InputError
from inferctl.serve.text.tokenizer_pool import TokenizerPool
from tests import tiny_models

WORDS = st.sampled_from(["a", "river", "unbelievably", "北京", "naïve", "\U0001f680", "-", "e\u0301", "\u0000", " "])
TEXTS = st.lists(WORDS, min_size=1, max_size=30).map(" ".join)
LIMITS = (16, 17)  # an odd and an even number of tokens remain for the texts


@pytest.fixture(scope="module", params=["bert", "roberta", "xlm-roberta", "modernbert"])
def folder(minilm: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder with the tokenizer of an architecture."""
    if request.param == "bert":
        return minilm
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = tiny_models.make_tokenizer(request.param)
    if request.param == "modernbert":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """The tokenizer that a CrossEncoder of sentence-transformers uses."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def make(folder: Path, limit: int, **options: Any) -> TokenizerPool:
    return TokenizerPool(folder, EmbeddingConfig(("mean",), limit), **options)


@pytest.fixture(scope="module")
def pools(folder: Path) -> dict[int, TokenizerPool]:
    return {limit: make(folder, limit) for limit in LIMITS}


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=100)
@example("river " * 40, ["a", "river " * 39, "river " * 40, "river " * 41, "river " * 500])
@example("a river", ["a " * 11, "a " * 12, "a " * 13, " \u0000 " * 2000 + "river", "x" * 2000 + " a river"])
def test_pairs_equal_those_of_transformers(
    reference: Any, pools: dict[int, TokenizerPool], query: str, documents: list[str]
) -> None:
    for limit, pool in pools.items():
        pairs = pool.encode_pairs_now(query, documents, truncate=True)
        for document, (ids, second_start) in zip(documents, pairs, strict=True):
            expected = reference(
                query, document, truncation="longest_first", max_length=limit, return_token_type_ids=True
            )
            assert ids.tolist() == expected["input_ids"]
            assert expected["token_type_ids"] == [0] * second_start + [1] * (len(ids) - second_start)


def test_truncated_pairs_are_counted_or_rejected(minilm: Path) -> None:
    counts: list[int] = []
    pool = make(minilm, 16, on_truncated=counts.append)
    documents = ["a " * 11, "a " * 12, "a"] * 30  # the first one fits exactly
    assert len(pool.encode_pairs_now("a river", documents, truncate=True)) == 90
    assert len(pool.encode_pairs_now("a river", documents[:1], truncate=False)) == 1
    assert counts == [30]
    with pytest.raises(InputError, match=r"^documents\[1\] has more than 16 tokens") as rejected:
        pool.encode_pairs_now("a river", documents, truncate=False)
    assert (str(rejected.value).split()[0], rejected.value.code) == ("documents[1]", "context_length_exceeded")


def test_long_texts_of_pairs_are_bounded(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, sizes = make(minilm, 16), []
    encode = pool._encode

    def spy(texts: list[str], special: bool) -> Any:
        sizes.extend(map(len, texts))
        return encode(texts, special)

    monkeypatch.setattr(pool, "_encode", spy)
    pool.encode_pairs_now("river " * 10**6, ["rock " * 10**6], truncate=True)
    assert max(sizes) <= text_parts.MIN_HEAD
    for query, documents, field in (("a", ["b", " " * 10**7], "documents[1]"), (" " * 10**7, ["b"], "query")):
        with pytest.raises(InputError) as rejected:
            pool.encode_pairs_now(query, documents, truncate=True)
        assert str(rejected.value).startswith(f"{field} is too long")
        assert (rejected.value.field, rejected.value.code) == (field.partition("[")[0], "text_too_long")


def test_each_document_can_have_its_own_query(minilm: Path) -> None:
    pool, queries, documents = make(minilm, 16), ["a river", "naïve", "slowly " * 20], ["a rock", "rocks", "a"]
    found = pool.encode_pairs_now(queries, documents, truncate=True)
    for query, document, pair in zip(queries, documents, found, strict=True):
        ((ids, start),) = pool.encode_pairs_now(query, [document], truncate=True)
        assert (pair[0].tolist(), pair[1]) == (ids.tolist(), start)
    with pytest.raises(InputError, match=r"^query\[2\] is too long"):
        pool.encode_pairs_now([*queries[:2], " " * 10**7], documents, truncate=True)


def test_the_prompt_precedes_the_query(minilm: Path) -> None:
    prompts = Prompts({"query": "Query: "}, "query")
    pool = TokenizerPool(minilm, EmbeddingConfig(("mean",), 64, prompts=prompts, lower_case=True))
    plain = make(minilm, 64)
    found = pool.encode_pairs_now("A River", ["A Rock"], truncate=True)
    expected = plain.encode_pairs_now("query: a river", ["a rock"], truncate=True)
    assert [(ids.tolist(), start) for ids, start in found] == [(ids.tolist(), start) for ids, start in expected]


def test_many_small_pairs_do_not_stop_the_event_loop(minilm: Path) -> None:
    pool = TokenizerPool(minilm, embedding_config.read(minilm))

    async def run() -> int:
        task = asyncio.create_task(pool.encode_pairs(["one two"] * 2048, ["three"] * 2048, truncate=True))
        turns = 0
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        return turns

    # With one call per pair, all on the event loop, there would be one turn.
    assert asyncio.run(run()) > 10
    pool.close()
