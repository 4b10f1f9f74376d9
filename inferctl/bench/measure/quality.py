"""How close a server's vectors, rerank scores or next tokens are to those of the same weights in fp32.

A process of its own (`inferctl.serve.reference`) computes the fp32 outputs.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from inferctl.bench.judge.neighbors import Matrix, cosines, max_similarities, nearest, padded, shared, unit
from inferctl.bench.load.target import ServerConnection
from inferctl.bench.measure import generation_quality
from inferctl.bench.plan import workload
from inferctl.bench.plan.sections import Quality
from inferctl.bench.plan.shape import DOCUMENTS
from inferctl.bench.stats import rank
from inferctl.config.spec import Task
from inferctl.core.errors import InferctlError
from inferctl.models import divergence, reference_process, vector_format
from inferctl.models import model as model_folder
from inferctl.models.divergence import Divergence, Limits, NoLogprobsError, Scored

_MOST_COMPACT = 2000  # vectors, of which all pairs are compared in each number format
_BATCH = 16

Inputs = list[str] | list[list[str]]


@dataclass(frozen=True)
class Reference:
    """The fp32 vectors of n texts, shape (n, dimensions), or the fp32 scores of n rerank requests, (n, documents).

    Of a classifier, the scores of n texts, (n, labels).

    An input is a text, or the query and the documents of a request.
    """

    inputs: Inputs
    values: Matrix


@dataclass(frozen=True)
class QualityResult:
    """The result of a quality check.

    `checked` is False if the outputs were not compared; `reason` then says why. If `passes` is False, `reason` says why
    the server returned no usable outputs, or a figure exceeds its limit. `limits` maps figures to limits.

    Embeddings have `cosine` (with the fp32 vectors: mean, first percentile and minimum), `recall_at_10`, and what the
    function `compact` returns. Rerank scores have `score_difference` (absolute: mean, maximum, and the range in fp32),
    `kendall` (mean of Kendall's tau over the requests) and `top_1` (share of the requests with the same best
    document). Scores of labels have `score_difference` and `top_1` (share of the texts with the same best label).
    Generation has the figures of `generation_quality.figures` and `positions`, the number of predicted tokens.
    `texts` counts the texts or the pairs.
    """

    checked: bool
    passes: bool | None = None
    reason: str | None = None
    texts: int | None = None
    cosine: Mapping[str, float] | None = None
    recall_at_10: float | None = None
    compact: Sequence[Mapping[str, Any]] | None = None
    score_difference: Mapping[str, Any] | None = None
    kendall: float | None = None
    top_1: float | None = None
    kl: Mapping[str, Any] | None = None
    agreement: Mapping[str, Any] | None = None
    perplexity: Mapping[str, float] | None = None
    positions: int | None = None
    limits: Mapping[str, float] | None = None
    corpus_sha256: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the `quality` key of a receipt: only the fields that this result has."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class QualityChecker:
    """Compares servers with the fp32 reference of the model folder `model`.

    The reference is computed once for each task and input limit that a server reports. Without `limits` the plan
    requests no check. Without `model` there are no weights to compare with.
    """

    def __init__(self, limits: Quality | None, model: Path | None) -> None:
        self._limits = limits
        self._model = model_folder.ModelFolder(model) if model else None
        self._references: dict[tuple[Task, int | None], Reference | list[Scored] | str] = {}

    def __call__(self, server: ServerConnection, on_wait: Callable[[float], None]) -> QualityResult:
        """Return the result for one server; `on_wait` receives the seconds passed while the reference is computed.

        If the server fails during the check, the result is a failure and not an unchecked server.
        """
        if self._limits is None:
            return unchecked("the plan requests no quality check: set `quality` in it")
        if self._model is None:
            return unchecked("no local model folder to compare with: pass `--model DIR`")
        model = server.info.get("model") or {}
        served = model.get("sha256")
        if not served:
            return unchecked("the server does not report the digest of its weights")
        if self._model.digest not in (served, model.get("original_sha256")):
            return unchecked(
                f"the server's weights ({served[:12]}…) are not those of the local folder: "
                "pass its model with `--model`"
            )
        max_input_tokens = (server.info.get("limits") or {}).get("max_input_tokens")
        key = (server.task, max_input_tokens)
        texts, digest = workload.read_corpus(self._limits.corpus)
        if key not in self._references:
            self._references[key] = _compute(self._model.path, self._limits, texts, *key, on_wait)
        expected = self._references[key]
        if isinstance(expected, str):
            return unchecked(expected)
        try:
            return replace(check(server, expected, self._limits), corpus_sha256=digest)
        except NoLogprobsError as error:
            return unchecked(error.message)
        except InferctlError as error:
            return broken(error.message)


def _compute(
    model: Path,
    limits: Quality,
    texts: list[str],
    task: Task,
    max_input_tokens: int | None,
    on_wait: Callable[[float], None],
) -> Reference | list[Scored] | str:
    """Return the reference, or the reason why there is none."""
    inputs: Inputs = texts[: limits.texts]
    if task == "rerank":
        inputs = workload.rerank_groups(texts[: limits.texts], DOCUMENTS)
    try:
        if task == "generate":
            return generation_quality.reference(model, texts, limits.tokens, on_wait)
        return reference(model, inputs, max_input_tokens, on_wait)
    except InferctlError as error:
        return error.message


def reference(model: Path, inputs: Inputs, max_input_tokens: int | None, on_wait: Callable[[float], None]) -> Reference:
    """Compute the reference in a process; `on_wait` receives the seconds passed.

    Inputs are truncated at `max_input_tokens`, as the server truncates them. Raises `InferctlError` if the process
    fails.
    """
    limit = ["--max-input-tokens", str(max_input_tokens)] if max_input_tokens else []
    sent: list[Any] = []
    for each in inputs:
        sent += [each] if isinstance(each, str) else [[each[0], document] for document in each[1:]]
    document = reference_process.run(model, sent, limit, on_wait)
    if "embeddings" in document or "sparse" in document or "token_vectors" in document:
        values = _values(document)
    else:
        values = np.asarray(document["scores"], np.float32).reshape(len(inputs), -1)
    return Reference(inputs, values)


def _values(document: Mapping[str, Any]) -> Matrix:
    """Return the first output of a model as vectors: of the vocabulary for sparse weights; padded ones for tokens."""
    if "sparse" in document and "embeddings" not in document:
        values = np.zeros((len(document["sparse"]), 1 + max(max(ids, default=0) for ids, _ in document["sparse"])))
        for row, (ids, weights) in zip(values, document["sparse"], strict=True):
            row[ids] = weights
        return values.astype(np.float32)
    encoded = document.get("embeddings") or document["token_vectors"]
    return padded([np.frombuffer(base64.b64decode(text), "<f4") for text in encoded])


def check(server: ServerConnection, expected: Reference | list[Scored], limits: Quality) -> QualityResult:
    """Send the inputs of the reference to `server` and compare the vectors, the scores or the log-probabilities.

    Raises `InferctlError` if the server fails or returns outputs that cannot be compared.
    """
    if isinstance(expected, list):
        return compare_tokens(divergence.compare(expected, [server.score(text.ids) for text in expected]), limits)
    if server.task == "rerank":
        scores = np.asarray([server.rerank(list(request)) for request in expected.inputs], np.float32)
        return compare_scores(expected.values, scores, limits)
    rows: list[Sequence[float]] = []
    texts, request = [str(text) for text in expected.inputs], server.embed
    what, unit = "vectors", "dimensions"
    if server.task == "classify":
        request, what, unit = server.classify, "scores", "labels"  # type: ignore[assignment]
    for start in range(0, len(texts), _BATCH):
        rows += request(texts[start : start + _BATCH])
    size, dense = expected.values.shape[1], server.task == "classify" or server.output == "dense"
    if dense and (wrong := [len(row) for row in rows if len(row) != size]):
        raise InferctlError(f"the server returned {what} of {wrong[0]} {unit}; the reference has {size}")
    vectors = padded(rows, size)
    if not np.isfinite(vectors).all():
        raise InferctlError(f"the server returned {what} with NaN or infinity")
    if server.task == "classify":
        return compare_labels(expected.values, vectors, limits)
    if not vectors.any(axis=1).all():
        raise InferctlError("the server returned vectors of zeros")
    wanted = padded(list(expected.values), vectors.shape[1])
    per_token = int(server.info["model"]["token_dimensions"]) if server.output == "tokens" else None
    return compare(wanted, vectors, limits, compact_formats=dense, per_token=per_token)


def compare(
    expected: Matrix, found: Matrix, limits: Quality, *, compact_formats: bool = True, per_token: int | None = None
) -> QualityResult:
    """Return cosine and recall@10 of two matrices of shape (n, dimensions), row by row.

    `per_token`: each row has vectors of tokens, of so many numbers each, and MaxSim decides which rows are near.
    """
    cosine = np.sort(np.sum(unit(expected) * unit(found), axis=1))
    near = [
        nearest(cosines(each) if per_token is None else max_similarities(each, each, per_token))
        for each in (expected, found)
    ]
    recall = float(shared(*near).mean())
    p1 = float(cosine[rank(len(cosine), 0.01) - 1])
    return QualityResult(
        checked=True,
        passes=p1 >= limits.min_cosine_p1 and recall >= limits.min_recall,
        texts=len(expected),
        cosine={"mean": round(float(cosine.mean()), 8), "p1": round(p1, 8), "min": round(float(cosine[0]), 8)},
        recall_at_10=round(recall, 4),
        compact=compact(expected[:_MOST_COMPACT], found[:_MOST_COMPACT]) if compact_formats else None,
        limits={"cosine_p1": limits.min_cosine_p1, "recall_at_10": limits.min_recall},
    )


def compare_scores(expected: Matrix, found: Matrix, limits: Quality) -> QualityResult:
    """Return how two matrices of rerank scores, shape (requests, documents), differ in values and in order."""
    kendall = float(np.mean([kendall_tau(*rows) for rows in zip(expected, found, strict=True)]))
    compared = _compare_rows(expected, found, limits)
    return replace(
        compared,
        passes=kendall >= limits.min_kendall and compared.passes,
        texts=expected.size,
        kendall=round(kendall, 4),
        limits={"kendall": limits.min_kendall, "score_difference": limits.max_score_difference},
    )


def compare_labels(expected: Matrix, found: Matrix, limits: Quality) -> QualityResult:
    """Return how two matrices of scores of labels, shape (texts, labels), differ in values and in the best label."""
    compared = _compare_rows(expected, found, limits)
    return replace(
        compared,
        passes=(compared.top_1 or 0) >= limits.min_top_1 and compared.passes,
        limits={"top_1": limits.min_top_1, "score_difference": limits.max_score_difference},
    )


def _compare_rows(expected: Matrix, found: Matrix, limits: Quality) -> QualityResult:
    """Return the difference of scores, and the share of rows with the same best one."""
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    low, high = float(expected.min()), float(expected.max())
    best = expected.max(axis=1) == expected[np.arange(len(expected)), found.argmax(axis=1)]
    return QualityResult(
        checked=True,
        passes=float(difference.max()) <= limits.max_score_difference * (high - low),
        texts=len(expected),
        score_difference={
            "mean": round(float(difference.mean()), 8),
            "max": round(float(difference.max()), 8),
            "range": (round(low, 8), round(high, 8)),
        },
        top_1=round(float(best.mean()), 4),
    )


def compare_tokens(found: Divergence, limits: Quality) -> QualityResult:
    """Return how far the next tokens of a server are from those of the reference."""
    return QualityResult(
        checked=True,
        passes=divergence.failure(found, Limits(limits.max_kl, limits.min_top_1)) is None,
        texts=len(found.texts),
        **generation_quality.figures(found),
        positions=found.positions,
        limits={"kl": limits.max_kl, "top_1": limits.min_top_1},
    )


def kendall_tau(first: Matrix, second: Matrix) -> float:
    """Return Kendall's tau-b of two arrays of shape (n,): 1 for the same order, 1 also if all values of both are equal.

    Pairs of equal values in one array only count against the agreement.
    """
    orders = [np.sign(values[:, None] - values[None, :]) for values in (first, second)]
    pairs = [float(np.sum(order**2)) for order in orders]
    if not all(pairs):
        return float(pairs[0] == pairs[1])
    return float(np.sum(orders[0] * orders[1])) / math.sqrt(pairs[0] * pairs[1])


def unchecked(reason: str) -> QualityResult:
    """Return the result for a server whose outputs were not compared."""
    return QualityResult(checked=False, reason=reason)


def broken(reason: str) -> QualityResult:
    """Return the result for a server that returned no usable outputs: it fails the check."""
    return QualityResult(checked=True, passes=False, reason=reason)


def compact(expected: Matrix, found: Matrix) -> list[dict[str, Any]]:
    """Return bytes and recall@10 of the vectors in each number format of responses.

    The distance of bits is the number of different ones, that of numbers the cosine.
    """
    near, rows = nearest(cosines(expected)), []
    for name in vector_format.FORMATS:
        if name == "binary":  # the same bits as ubinary
            continue
        converted = vector_format.convert(found, name)
        if name == "ubinary":
            bits = np.unpackbits(converted, axis=1, count=found.shape[1]).astype(np.float32)
            got = nearest(-(bits @ (1 - bits).T) - (1 - bits) @ bits.T)
        else:
            got = nearest(cosines(converted))
        size = vector_format.size(found.shape[1], name)
        rows.append({"output_dtype": name, "bytes": size, "recall_at_10": round(float(shared(near, got).mean()), 4)})
    return rows
