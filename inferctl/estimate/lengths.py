"""Generates lengths of inputs in tokens: of SQuAD samples in MLPerf, from a distribution, or of a corpus."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist

from inferctl.core.errors import UsageError

# SQuAD v1.1 has 10,570 development questions. MLPerf splits them into 10,833 samples: windows of 384 tokens with a
# stride of 128. So about 2% of the questions are longer than 384 tokens. With this share fixed, a log-normal
# distribution of lengths has one free parameter, its mean.
SQUAD_LONGEST = 384
_SQUAD_OVER = 0.02
_TOKENS_PER_WORD = 1.3
_FORMS = "a number of tokens (128), MEAN:SIGMA of a log-normal distribution (55:0.8), or squad"


def lognormal(median: float, sigma: float, longest: int, count: int) -> list[int]:
    """Return `count` lengths with the quantiles of a log-normal distribution up to `longest`, shuffled."""
    normal = NormalDist(math.log(median), sigma)
    found = [max(1, min(longest, round(math.exp(normal.inv_cdf((i + 0.5) / count))))) for i in range(count)]
    return spread(found, count)


def squad(mean: float, count: int) -> list[int]:
    """Return `count` lengths distributed as the BERT samples of MLPerf without padding, with the mean `mean`."""
    beyond = NormalDist().inv_cdf(1 - _SQUAD_OVER)
    low, high = 20.0, float(SQUAD_LONGEST)
    while high - low > 0.05:
        median = (low + high) / 2
        sample = lognormal(median, math.log(SQUAD_LONGEST / median) / beyond, SQUAD_LONGEST, 2000)
        low, high = (median, high) if sum(sample) / len(sample) < mean else (low, median)
    return lognormal(low, math.log(SQUAD_LONGEST / low) / beyond, SQUAD_LONGEST, count)


def parse(text: str, longest: int, squad_mean: float, count: int) -> list[int]:
    """Return lengths for a value of `--length`: `128`, `55:0.8` (mean and sigma of a log-normal) or `squad`.

    Raises `UsageError`.
    """
    if text == "squad":
        return squad(squad_mean, count)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?::(\d+(?:\.\d+)?))?", text)
    mean = float(found[1]) if found else 0.0
    sigma = float(found[2] or 0) if found else 0.0
    if not 1 <= mean <= longest or sigma > 3:
        raise UsageError(f"invalid --length {text!r} (limit {longest} tokens)", f"pass {_FORMS}")
    return lognormal(mean / math.exp(sigma * sigma / 2), sigma, longest, count) if sigma else [round(mean)] * count


def spread(lengths: Sequence[int], count: int) -> list[int]:
    """Return `count` lengths: all of `lengths` equally often, shuffled in the same way each time."""
    found = [lengths[i % len(lengths)] for i in range(count)]
    random.Random(0).shuffle(found)
    return found


def of_texts(texts: Sequence[str], tokenizer: Path | None, longest: int) -> tuple[list[int], str]:
    """Return the number of tokens of each text, up to `longest`, and how they were counted.

    The model's `tokenizer.json` counts the tokens. Without it, they are estimated from the number of words.
    """
    if tokenizer is not None and tokenizer.is_file() and find_spec("tokenizers"):
        from tokenizers import Tokenizer

        loaded = Tokenizer.from_file(str(tokenizer))
        loaded.no_truncation()
        loaded.no_padding()
        return [
            min(longest, len(encoding.ids)) for encoding in loaded.encode_batch(list(texts))
        ], "counted with the model's tokenizer"
    found = [min(longest, 2 + math.ceil(_TOKENS_PER_WORD * len(text.split()))) for text in texts]
    return found, f"estimated with {_TOKENS_PER_WORD:g} tokens per word, because no tokenizer is available"
