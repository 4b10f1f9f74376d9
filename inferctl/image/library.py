"""Compares what a server returns for raw text with the library of its task, which runs in a process of its own.

The fp32 reference shares the tokenizer and the configuration of a model folder with the server. The library reads the
folder on its own, so that this comparison detects errors in those, too.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferctl.core.errors import NotReadyError
from inferctl.image import output_checks
from inferctl.image.output_checks import QUERY, cosine, fail, limit
from inferctl.models import output_vectors, reference_process
from inferctl.models.reference_process import LIBRARIES

NAME = "sentence-transformers"
# What implementations treat differently: case, special tokens in a text, a text without words (servers reject an empty
# one), and one with more than the 512 tokens of most models.
_SPECIAL = "the end [SEP] [CLS] [MASK] </s> <s> <|endoftext|> of it"
TEXTS = (
    *output_checks.TEXTS,
    "WHICH RIVER FLOWS THROUGH VIENNA? Ångström, naïve café",
    _SPECIAL,
    " ",
    "Padding costs time, and each token costs memory. " * 60,
)
# Two computations in fp32 differ only by the order of sums. Relative to the largest number, at least 1.
FP32_LIMIT = 1e-5
_SECONDS = 600.0
_HINT = (
    "compare `model` of GET /info with the files of the model; `inferctl build --no-verify` builds without this test"
)


@dataclass(frozen=True)
class LibraryComparison:
    """How close a server is to the library, of which `library` is name and version.

    `cosine_min`: the lowest cosine of the vectors, None for scores. `difference`: the largest one of two numbers of
    vectors, or of two scores, relative to the largest number of the library (at least 1). `tolerance` is the limit of
    `difference` in fp32 and for scores, else that of `cosine_min`.
    """

    library: str
    texts: int
    cosine_min: float | None
    difference: float
    tolerance: float

    @property
    def figures(self) -> str:
        """The figures as text."""
        cosine = "" if self.cosine_min is None else f"lowest cosine {self.cosine_min:.6f}, "
        return f"{cosine}largest relative difference {self.difference:.2g}"


class NotComparedError(NotReadyError):
    """The library cannot compute what the server is compared with."""


def installed(name: str = NAME) -> bool:
    """Return whether a library is installed next to inferctl."""
    return importlib.util.find_spec(name.replace("-", "_")) is not None


def require(name: str) -> None:
    """Raise `NotReadyError` unless a library is installed."""
    if not installed(name):
        raise NotReadyError(f"{name} is not installed", f"install it next to inferctl: `pip install {name}`")


def compare(outputs: Sequence[Any], info: Mapping[str, Any], folder: Path) -> LibraryComparison:
    """Compare the vectors or the scores that a server returned for `TEXTS` with those of the library of its task.

    `info`: the `GET /info` of the server. `folder`: what the library loads. Raises `InferctlError` if they differ by
    more than the precision of the server explains, and `NotComparedError` if the library cannot compute them.
    """
    task = info.get("task", "embed")
    name = LIBRARIES[task]
    # In a template, these tokens are text for the server, and tokens for the library.
    known = {_SPECIAL} if (info.get("model") or {}).get("template") else set()
    kept = [(text, output) for text, output in zip(TEXTS, outputs, strict=True) if text not in known]
    texts, rows = [text for text, _ in kept], [output for _, output in kept]
    inputs: list[Any] = [[QUERY, text] for text in texts] if task == "rerank" else list(texts)
    longest = (info.get("limits") or {}).get("max_input_tokens")
    options = ["--library", "--task", task]
    options += ["--max-input-tokens", str(longest)] if longest else []
    try:
        found = reference_process.run(folder, inputs, options, _check_time)
    except reference_process.ReferenceFailedError as error:
        raise NotComparedError(
            f"not compared with {name}: {error.reason}",
            "check that the library loads this folder, or compare the server with another folder: `--model DIR`",
        ) from None
    expected = found.get("scores", [])
    if task == "embed":
        expected = [output_vectors.decode(text) for text in found["embeddings"]]
    elif task == "rerank":
        expected, rows = [[score] for score in found["scores"]], [[score] for score in rows]
    same = found["model_sha256"] == (info.get("model") or {}).get("sha256")
    others = "" if same else f"; the files of the server are not those of {folder}"
    return _compared(texts, rows, expected, info, f"{name} {found['library']}", others, scores=task != "embed")


def _check_time(seconds: float) -> None:
    if seconds > _SECONDS:
        raise NotComparedError(
            f"not compared with the library: it took longer than {_SECONDS:.0f} s", "use a faster machine"
        )


def _compared(
    texts: Sequence[str],
    rows: Sequence[Sequence[float]],
    expected: Sequence[Sequence[float]],
    info: Mapping[str, Any],
    library: str,
    others: str,
    *,
    scores: bool,
) -> LibraryComparison:
    for row, other in zip(rows, expected, strict=True):
        if len(row) != len(other):
            fail(f"the vectors have {len(row)} numbers, those of {library} have {len(other)}{others}", _HINT)
    scale = max(1.0, *(abs(x) for other in expected for x in other))
    pairs = list(zip(rows, expected, strict=True))
    differences = [max(abs(x - y) for x, y in zip(row, other, strict=True)) / scale for row, other in pairs]
    precision = info.get("precision") or {}
    effective = str(precision.get("effective", "an unknown precision"))
    # That of the check at the start of the server, which has none for large models.
    tolerance = (info.get("fidelity") or {}).get("limit") or limit(effective, precision.get("level", ""), scores=scores)
    errors, most = differences, tolerance
    if effective == "fp32" and not precision.get("tf32"):
        tolerance = most = FP32_LIMIT
    elif not scores:
        errors, most = [_distance(row, other) for row, other in pairs], 1 - tolerance
    # Static embeddings of a text without tokens are zero.
    cosine_min = None if scores else min(1.0 if row == other else cosine(row, other) for row, other in pairs)
    found = LibraryComparison(library, len(rows), cosine_min, max(differences), tolerance)
    # `not` so that NaN fails.
    if wrong := [number for number, error in enumerate(errors) if not error <= most]:
        worst = max(wrong, key=lambda number: errors[number])
        text = texts[worst] if len(texts[worst]) <= 40 else f"{texts[worst][:39]}…"
        allowed = f"a difference of {most:g}" if errors is differences else f"a cosine of {tolerance:g}"
        fail(
            f"{len(wrong)} of {len(rows)} texts differ from {library}: {found.figures}; the limit in {effective} is "
            f"{allowed}; {text!r} differs most{others}",
            _HINT,
        )
    return found


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Return |a - b|^2 / (2 |a| |b|): 1 - cosine of vectors of equal length. A difference of the lengths adds to it."""
    lengths = math.hypot(*a) * math.hypot(*b)
    return 0.0 if a == b else math.dist(a, b) ** 2 / (2 * lengths) if lengths else math.inf
