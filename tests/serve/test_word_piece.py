"""nanotoken instead of tokenizers: equal ids, sizes and pairs, or not at all."""

from __future__ import annotations

import json
import os
import random
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nanotoken
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from inferctl.reading import embedding_config
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.serve.text.text_parts import InputError
from inferctl.serve.text.tokenizer_pool import TokenizerPool

COUNT = int(os.environ.get("INFERCTL_TOKENIZER_TEXTS", "400"))  # texts per tokenizer
CORPUS = Path(__file__).parent.parent.parent / "benchmarks" / "corpora" / "paragraphs.jsonl"
LIMIT = 64


def texts(count: int, seed: int) -> Iterator[str]:
    """Yield prose, mixtures of scripts, special tokens and long words, and random characters."""
    random_ = random.Random(seed)
    words = " ".join(json.loads(line)["text"] for line in CORPUS.read_text().splitlines()).split()

    def letters(first: int, size: int, most: int) -> str:
        found = (chr(first + random_.randrange(size)) for _ in range(random_.randint(0, most)))
        return "".join(each for each in found if not "\ud800" <= each <= "\udfff")

    def word() -> str:  # of one block of 128 characters, and so mostly of one script
        found = letters(random_.randrange(random_.choice((0x600, 0x3200, 0x30000))) & ~0x7F, 128, 12)
        return unicodedata.normalize("NFD", found) if random_.random() < 0.2 else found

    def long_word() -> str:
        return random_.choice("aé北\u0301.") * random_.choice((99, 100, 101, 199, 200, 201))

    def special() -> str:
        return random_.choice(("[CLS]", "[SEP]", "[MASK]", "[UNK]", "[PAD]", "[mask]", "<new>", "[MASK", "##s"))

    for index in range(count):
        kind, start = index % 10, random_.randrange(len(words) - 200)
        if kind < 3:
            yield " ".join(words[start : start + random_.randint(1, 120)])
        elif kind < 8:
            makers = random_.choices((word, long_word, special, lambda: random_.choice(words)), (6, 1, 2, 3), k=8)
            yield random_.choice((" ", "", "\n", "\u00a0")).join(make() for make in makers)
        else:
            yield letters(0, 0x30000, 80)


def cased(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)


def accented(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.BertNormalizer(handle_chinese_chars=False, strip_accents=False)


def other_steps(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def more_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("<new>", lstrip=True), AddedToken("river", single_word=True, rstrip=True)])


def unchanged(_: Tokenizer) -> None:
    pass


@pytest.mark.parametrize("change", [unchanged, cased, accented, other_steps, more_tokens])
@pytest.mark.parametrize("lower_case", [False, True])
def test_ids_and_pairs_equal_those_of_tokenizers(
    minilm: Path, tmp_path: Path, change: Callable[[Tokenizer], None], lower_case: bool
) -> None:
    whole = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    whole.no_padding()
    whole.no_truncation()
    change(whole)
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')  # it has segments
    pool = TokenizerPool(tmp_path, EmbeddingConfig(("mean",), LIMIT, lower_case=lower_case))
    assert pool.library["library"].startswith("nanotoken")
    if lower_case and change is not other_steps:  # which has Lowercase: sentence-transformers adds no second one
        whole.normalizer = normalizers.Sequence([normalizers.Lowercase(), whole.normalizer])
    whole.enable_truncation(LIMIT)
    given = list(texts(COUNT, seed=LIMIT))
    expected = whole.encode_batch(given)
    for text, ids, encoding in zip(given, pool.encode_now(given, truncate=True), expected, strict=True):
        assert ids.tolist() == encoding.ids, ascii(text)
        assert ids.dtype == np.int32
        if encoding.overflowing:
            with pytest.raises(InputError):
                pool.encode_now([text], truncate=False)
        else:
            assert len(pool.encode_now([text], truncate=False)) == 1
    query, documents = given[0][:120], given[1:]
    pairs = whole.encode_batch([(query, document) for document in documents])
    found = pool.encode_pairs_now(query, documents, truncate=True)
    for document, (ids, second_start), pair in zip(documents, found, pairs, strict=True):
        assert (ids.tolist(), second_start) == (pair.ids, pair.type_ids.index(1)), ascii(document)


def other_ids(ids: Any) -> Any:
    return ids + (len(ids) > 1000)


def raises(_: Any) -> Any:
    raise ValueError


@pytest.mark.parametrize(("fault", "reason"), [(other_ids, "other ids"), (raises, "ValueError")])
def test_tokenizers_replaces_a_faulty_nanotoken(
    minilm: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any], reason: str
) -> None:
    class Faulty:
        def __init__(self, inner: Any) -> None:
            self.inner, self.suffix_ids = inner, inner.suffix_ids

        @classmethod
        def from_json(cls, data: str) -> Faulty:
            return cls(nanotoken.WordPieceTokenizer.from_json(data))

        def encode_batch(self, texts: list[str], **options: Any) -> Any:
            ids, offsets = self.inner.encode_batch(texts, **options)
            return fault(ids), offsets

    expected = TokenizerPool(minilm, embedding_config.read(minilm)).encode_now(["a text"], truncate=True)
    names = {name: getattr(nanotoken, name) for name in ("set_cache_entries", "UnsupportedTokenizerError")}
    monkeypatch.setitem(sys.modules, "nanotoken", SimpleNamespace(WordPieceTokenizer=Faulty, **names))
    pool = TokenizerPool(minilm, embedding_config.read(minilm))
    assert pool.library["library"].startswith("tokenizers") and reason in pool.library["reason"]
    assert np.array_equal(pool.encode_now(["a text"], truncate=True), expected)


def test_other_kinds_of_tokenizers_stay_with_the_library(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    pool = TokenizerPool(tmp_path, EmbeddingConfig(("mean",), LIMIT))
    assert pool.library["library"].startswith("tokenizers")
    assert [ids.tolist() for ids in pool.encode_now(["ab", "a"], truncate=True)] == [[2], [0]]


def test_no_words_are_remembered(minilm: Path) -> None:
    TokenizerPool(minilm, embedding_config.read(minilm)).close()
    assert nanotoken.get_cache_entries() <= 1  # what 0 sets
