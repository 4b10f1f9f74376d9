"""Measure how long a request that is tokenized on the event loop stops the loop.

    python benchmarks/peers/tokenising.py [--characters 1000] [--rounds 5] [--json FILE]

Texts of many kinds, chosen to be slow, with WordPiece (the model's own tokenizer, also in nanotoken), BPE with a
byte-level pre-tokenizer (GPT-2, ModernBERT), BPE without pre-tokenizer (Llama) and Unigram (XLM-R). The latter three
are trained on the benchmark's corpus. CPU time of the calling thread, which is the time that an idle machine needs.
Each measurement has a new tokenizer, because the library caches words.
"""

from __future__ import annotations

import json
import os
import random
import string
import sys
import time
from functools import partial
from typing import Any

import peers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(peers.ROOT))
from inferctl.serve.word_piece import WordPiece

VOCABULARY, MAX_TOKENS = 8_000, 512


def tokenizers() -> dict[str, str]:
    """Return the JSON of each tokenizer."""
    lines = (peers.ROOT / "benchmarks" / "corpora" / "paragraphs.jsonl").read_text().splitlines()
    corpus = [json.loads(line)["text"] for line in lines]
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe_trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    byte_level.train_from_iterator(corpus, bpe_trainer)

    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", *byte_tokens]
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    )
    whole_text = {**json.loads(bpe.to_str()), "pre_tokenizer": None}
    whole_text["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}

    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<unk>", "</s>"]
    unigram_trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, unk_token="<unk>", special_tokens=special, show_progress=False
    )
    unigram.train_from_iterator(corpus, unigram_trainer)
    return {
        "WordPiece": (peers.MODEL / "tokenizer.json").read_text(),
        "byte-level BPE": byte_level.to_str(),
        "BPE": json.dumps(whole_text),
        "Unigram": unigram.to_str(),
    }


def texts(characters: int) -> dict[str, str]:
    """Return texts with this number of characters."""
    random_ = random.Random(1)
    letters = "".join(random_.choices(string.ascii_lowercase, k=characters))

    def repeated(part: str) -> str:
        return (part * characters)[:characters]

    def drawn(first: int, last: int) -> str:
        return "".join(chr(random_.randrange(first, last)) for _ in range(characters))

    return {
        "prose": " ".join(peers.texts(100))[:characters],
        "one word": letters,
        "words of 99 letters": " ".join(letters[at : at + 99] for at in range(0, characters, 100)),
        "one letter": repeated("x"),
        "words of one letter": repeated("a "),
        "digits": repeated("0123456789"),
        "punctuation": repeated(".,!?-"),
        "blanks": repeated(" "),
        "blanks and letters": repeated("  x"),
        "newlines": repeated(" \n"),
        "Chinese": drawn(0x4E00, 0x9FA5),
        "Korean": drawn(0xAC00, 0xD7A3),
        "emoji": drawn(0x1F300, 0x1F600),
        "joined emoji": repeated("\U0001f468\u200d\U0001f469\u200d\U0001f467"),
        "zero-width spaces": repeated("\u200b"),
        "combining characters": repeated("a\u0300\u0323\u0345"),
        "ligature of 18 characters": repeated("\ufdfa"),
        "special tokens": repeated("[MASK]"),
    }


def milliseconds(tokenizer: str, text: str, rounds: int, *, word_piece: bool = False) -> float:
    """Return the median of the CPU milliseconds. `word_piece`: of nanotoken."""
    times = []
    for _ in range(rounds):
        fresh = Tokenizer.from_str(tokenizer)
        fresh.no_padding()
        fresh.enable_truncation(MAX_TOKENS)
        encode: Any = fresh.encode_batch_fast
        if word_piece:
            encode = partial(WordPiece(fresh, MAX_TOKENS).encode, add_special_tokens=True)
        encode(["the first call"])
        begin = time.thread_time()
        encode([text])
        times.append(1000 * (time.thread_time() - begin))
    return peers.median(times)


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=5)
    parser.add_argument("--characters", type=int, default=1_000, help="length of the texts")
    options = parser.parse_args()
    os.environ.update(peers.environment())  # as in the server: the tokenizer starts no threads
    built = tokenizers()
    found = {
        kind: {
            "nanotoken": milliseconds(built["WordPiece"], text, options.rounds, word_piece=True),
            **{name: milliseconds(tokenizer, text, options.rounds) for name, tokenizer in built.items()},
        }
        for kind, text in texts(options.characters).items()
    }
    peers.table(("text (ms)", "nanotoken", *built), [(kind, *times.values()) for kind, times in found.items()])
    peers.write(options.json, {"characters": options.characters, "milliseconds": found})


if __name__ == "__main__":
    main()
