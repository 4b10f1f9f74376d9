"""Measure what the word cache saves and costs: the server's tokenization with and without it.

    python benchmarks/peers/tokenising.py [--texts FILE] [--rounds 4] [--json FILE]

Single texts, one after another, alternating between both (with, without, without, with, ...). The texts are of these
kinds: all words are in the cache; one word in ten is new; random letters in which nothing repeats; the lines of FILE,
each one once.
"""

from __future__ import annotations

import asyncio
import os
import random
import string
import time
from collections.abc import Sequence
from pathlib import Path

import frontend
import peers

from inferctl.serve import embedding_config
from inferctl.serve.tokenizer_pool import TokenizerPool

TEXTS = 4_000


def random_letters(count: int) -> list[str]:
    """Return texts of 250 random characters, of which one in six is a space."""
    random_ = random.Random(5)
    return ["".join(random_.choices(string.ascii_lowercase + 5 * " ", k=250)) for _ in range(count)]


async def _microseconds(pool: TokenizerPool, texts: Sequence[str]) -> float:
    begin = time.perf_counter()
    for text in texts:
        await pool.encode([text], truncate=True)
    return 1e6 * (time.perf_counter() - begin) / len(texts)


def measure(texts: Sequence[str], rounds: int) -> tuple[float, float]:
    """Return microseconds per text with and without the word cache.

    Each round has its own texts. The cache keeps words of earlier rounds.
    """
    how = embedding_config.read(peers.MODEL)
    words, whole = TokenizerPool(peers.MODEL, how), TokenizerPool(peers.MODEL, how)
    whole._words = None
    parts = [texts[number::rounds] for number in range(rounds)]
    times: dict[bool, list[float]] = {True: [], False: []}
    for number, part in enumerate(parts):
        for remembered in (True, False) if number % 2 else (False, True):
            times[remembered].append(asyncio.run(_microseconds(words if remembered else whole, part)))
    for pool in (words, whole):
        pool.close()
    return peers.median(times[True]), peers.median(times[False])


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=4)
    parser.add_argument("--texts", type=Path, help="file with one text per line")
    options = parser.parse_args()
    os.environ.update(peers.environment())  # as in the server: the tokenizer starts no threads
    known = peers.texts(500)
    kinds = {
        "known words": known * (TEXTS // len(known)),
        "one new word in ten": frontend.with_new_words(TEXTS),
        "nothing twice": random_letters(TEXTS),
    }
    if options.texts:
        kinds[options.texts.name] = [text for text in options.texts.read_text().splitlines() if text.strip()]
    found = {kind: measure(texts, options.rounds) for kind, texts in kinds.items()}
    rows = [(kind, words, whole, words / whole) for kind, (words, whole) in found.items()]
    peers.table(("texts", "us by words", "us whole", "ratio"), rows)
    peers.write(options.json, {"microseconds": {kind: list(times) for kind, times in found.items()}})


if __name__ == "__main__":
    main()
