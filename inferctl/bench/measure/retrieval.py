"""How well the vectors of a server find the relevant documents of a collection.

    queries, documents -> server -> vectors -> formats and dimensions -> 100 best documents -> trec_eval's measures

The server computes the vectors. This process makes other formats and dimensions of the same vectors, and compares each
query with all documents, without an index.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from inferctl.bench.load.http_json import StatusError
from inferctl.bench.load.target import ServerConnection
from inferctl.bench.plan.collection import Collection
from inferctl.core.errors import InferctlError
from inferctl.models import vector_format

FORMATS = ("float32", "float16", "bfloat16", "int8", "binary")
MEASURES = {"ndcg_at_10": "ndcg_cut_10", "recall_at_10": "recall_10", "recall_at_100": "recall_100"}
DEPTH, RERANKED = 100, 20
_BATCH, _CHUNK = 32, 64
_WAITS_S = (1, 2, 4, 8, 16, 32)
_NO_PROMPT: dict[str, Any] = {"prompt": ""}

Matrix = npt.NDArray[np.float32]
# Scores of queries (from, to) with all documents, shape (queries, documents).
Scores = Callable[[int, int], Matrix]
Run = dict[str, dict[str, float]]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Variant:
    """The measures of one way to store and compare the vectors of a server.

    `bytes` is the mean size of what is stored of a document. `per_query` is nDCG@10 in the order of the ids of queries.
    The other measures are means over queries. `milliseconds` is the median time to rerank a query: 0 if other
    configurations had the same documents.
    """

    name: str
    output: str
    format: str
    dimensions: int | None
    bytes: float
    ndcg_at_10: float = 0.0
    recall_at_10: float = 0.0
    recall_at_100: float = 0.0
    mrr_at_10: float = 0.0
    per_query: Sequence[float] = ()
    milliseconds: float | None = None


@dataclass(frozen=True)
class RetrievalResult:
    """The measures of a server. The first variant is what the server returns, in float32.

    `reason` says why there are no variants, or none of a reranker. `roles`: whether the server accepted what is a query
    and what a document. `truncated` counts texts above the limit of the model; None if the server does not say it.
    `run` has the best documents of the first variant by query.
    """

    collection: Mapping[str, object]
    variants: Sequence[Variant] = ()
    reason: str | None = None
    roles: bool | None = None
    truncated: int | None = None
    run: Run = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the `retrieval` key of a receipt, without ids."""
        return {key: value for key, value in asdict(self).items() if key != "run"}


def unmeasured(collection: Collection, reason: str) -> RetrievalResult:
    """Return the result for a server of which no measure is known."""
    return RetrievalResult(collection.as_dict(), reason=reason)


def measure(
    server: ServerConnection, collection: Collection, dimensions: Sequence[int], notify: Callable[[float], None]
) -> RetrievalResult:
    """Return the measures of a server; `notify` receives the seconds passed. A server that fails has a `reason`."""
    try:
        client, run = _Client(server, notify), Run()
        variants: list[Variant] = []
        # In descending order of ids: trec_eval orders equal scores so.
        names = sorted(collection.documents, reverse=True)
        texts = list(collection.queries.values()), [collection.documents[name] for name in names]
        roles: list[dict[str, Any]] = [{"input_type": "query"}, {"input_type": "document"}]
        for output in (server.info.get("model") or {}).get("trained_outputs") or ["dense"]:
            for prompted in (True, False) if client.has_prompts(output, roles, texts) else (True,):
                hows = roles if prompted else [_NO_PROMPT] * 2
                queries, documents = (client.embed(part, output, how) for part, how in zip(texts, hows, strict=True))
                for variant, scores in _VARIANTS[output](queries, documents, dimensions):
                    best = ranked(scores, list(collection.queries), names)
                    run = run or best
                    name = variant.name if prompted else f"{variant.name}, no prompts"
                    variants.append(_measured(replace(variant, name=name), best, collection))
                    if not prompted:
                        break
        truncated = client.truncated([*texts[0], *texts[1]])
        return RetrievalResult(collection.as_dict(), variants, None, client.roles, truncated, run)
    except InferctlError as error:
        return unmeasured(collection, error.message)


def reranked(
    server: ServerConnection,
    collection: Collection,
    found: RetrievalResult,
    scores: dict[tuple[str, str], float],
    notify: Callable[[float], None],
) -> RetrievalResult:
    """Return a result with one more variant: its 20 best documents in the order of a reranker, then the others.

    `scores` keeps those of pairs of query and document. Raises `InferctlError` if the reranker fails.
    """
    run: Run = {}
    times, started = list[float](), time.monotonic()
    for query, text in collection.queries.items():
        best = list(found.run[query])
        first, begun = best[:RERANKED], time.monotonic()
        if new := [document for document in first if (query, document) not in scores]:
            texts = [text, *(collection.documents[document] for document in new)]
            found_scores = patiently(partial(server.rerank, texts))
            scores |= {(query, each): score for each, score in zip(new, found_scores, strict=True)}
            times += [time.monotonic() - begun] * (len(new) == RERANKED)
        first.sort(key=lambda document: (scores[query, document], document), reverse=True)
        run[query] = {document: float(DEPTH - place) for place, document in enumerate(first + best[RERANKED:])}
        notify(time.monotonic() - started)
    milliseconds = round(1000 * float(np.median(times)), 2) if times else 0.0
    variant = replace(found.variants[0], name="reranked", milliseconds=milliseconds)
    return replace(found, variants=[*found.variants, _measured(variant, run, collection)], reason=None)


def ranked(scores: Scores, queries: Sequence[str], names: Sequence[str]) -> Run:
    """Return the 100 best documents of each query, with their scores. `names`: of the documents, in descending order.

    trec_eval reads 32 bits of a score and orders equal ones by the larger id, so the rank of 100 depends on both.
    """
    run: Run = {}
    for start in range(0, len(queries), _CHUNK):
        for query, row in zip(queries[start:], scores(start, start + _CHUNK), strict=False):
            rest = row.astype(np.float32)
            least = np.partition(rest, -DEPTH)[-DEPTH] if len(rest) > DEPTH else -np.inf
            (places,) = np.nonzero(rest >= least)
            best = places[np.argsort(-rest[places], kind="stable")][:DEPTH]
            run[query] = {names[place]: float(rest[place]) for place in best}
    return run


def evaluate(run: Run, judgments: Mapping[str, Mapping[str, int]]) -> dict[str, list[float]]:
    """Return trec_eval's measures of each query, in the order of `judgments`."""
    import pytrec_eval

    first = {query: dict(list(scores.items())[:10]) for query, scores in run.items()}
    found = pytrec_eval.RelevanceEvaluator(judgments, set(MEASURES.values())).evaluate(run)
    ranks = pytrec_eval.RelevanceEvaluator(judgments, {"recip_rank"}).evaluate(first)
    measures = {name: [found[query][theirs] for query in judgments] for name, theirs in MEASURES.items()}
    return measures | {"mrr_at_10": [ranks[query]["recip_rank"] for query in judgments]}


def _measured(variant: Variant, run: Run, collection: Collection) -> Variant:
    found = evaluate(run, collection.judgments)
    means: dict[str, Any] = {name: round(float(np.mean(values)), 6) for name, values in found.items()}
    return replace(variant, **means, per_query=[round(value, 6) for value in found["ndcg_at_10"]])


def _dense(queries: Any, documents: Any, dimensions: Sequence[int]) -> Iterator[tuple[Variant, Scores]]:
    """Yield the cosine in each format and size; bits are compared by the number of different ones."""
    full = len(queries[0])
    if {len(row) for row in (*queries, *documents)} != {full}:
        raise InferctlError("the server returned vectors of different sizes")
    whole = np.stack(queries), np.stack(documents)
    for size in (full, *(each for each in dimensions if each < full)):
        for name in FORMATS if size == full else ("float32", "int8", "binary"):
            left, right = (convert(_unit(each[:, :size]), name) for each in whole)
            if name != "binary":  # products of 1 and -1 are exact, so that equal distances are equal scores
                left, right = _unit(left), _unit(right)
            number = 4 if name == "float32" else 1 if name == "int8" else 2
            stored = vector_format.size(size, "ubinary") if name == "binary" else number * size
            label = name if size == full else f"{name}-{size}"
            yield Variant(label, "dense", name, size, stored), partial(_products, left, right)


def _products(left: Matrix, right: Matrix, first: int, last: int) -> Matrix:
    return left[first:last] @ right.T


def convert(vectors: Matrix, name: str) -> Matrix:
    """Return vectors, shape (n, dimensions), with the precision of a format of `FORMATS`, as float32.

    bfloat16 rounds to the nearest even. int8 has one scale for each vector. A bit becomes 1 or -1, so that the order of
    dot products is that of the Hamming distance.
    """
    if name == "float16":
        return vector_format.convert(vectors, "float16").astype(np.float32)
    if name == "bfloat16":
        bits = np.ascontiguousarray(vectors).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    if name == "int8":
        vectors = np.rint(vectors * (127 / np.abs(vectors).max(axis=1, keepdims=True)))
    return np.where(vectors > 0, np.float32(1), np.float32(-1)) if name == "binary" else vectors


def _unit(vectors: Matrix) -> Matrix:
    found: Matrix = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


def _sparse(queries: Any, documents: Any, dimensions: Sequence[int]) -> Iterator[tuple[Variant, Scores]]:
    """Yield the dot product of sparse weights. A weight has four bytes, and so has its token."""
    from scipy import sparse  # a dependency of pytrec-eval-terrier

    left, right = sparse.vstack(queries), sparse.vstack(documents).T.tocsc()
    size = 8 * right.nnz / right.shape[1]
    yield Variant("sparse", "sparse", "float32", None, size), lambda a, b: (left[a:b] @ right).toarray()


def _tokens(queries: Any, documents: Any, dimensions: Sequence[int]) -> Iterator[tuple[Variant, Scores]]:
    """Yield MaxSim: for each token of the query the highest dot product with a token of the document, added."""
    every = np.concatenate(documents)
    starts = np.cumsum([0, *map(len, documents[:-1])])

    def scores(first: int, last: int) -> Matrix:
        rows = (np.maximum.reduceat(each @ every.T, starts, axis=1).sum(axis=0) for each in queries[first:last])
        return np.stack(list(rows))

    yield Variant("tokens", "tokens", "float32", every.shape[1], 4 * every.size / len(documents)), scores


_VARIANTS = {"dense": _dense, "sparse": _sparse, "tokens": _tokens}


class _Client:
    """Requests vectors in batches, with the role of the texts if the server accepts it."""

    def __init__(self, server: ServerConnection, notify: Callable[[float], None]) -> None:
        self._server, self._notify, self._started = server, notify, time.monotonic()
        self._model = server.info.get("model") or {}
        self._own = bool(server.info.get("name"))
        # text-embeddings-inference ignores unknown keys of its own endpoint.
        self.roles: bool | None = False if server.path == "/embed" else None

    def embed(self, texts: Sequence[str], output: str, how: dict[str, Any]) -> list[Any]:
        """Return an array for each text: (dimensions,), sparse (1, vocabulary), or (tokens, dimensions)."""
        more: dict[str, Any] = {"truncate": True, "outputs": [output]} if self._own else {}
        found: list[Any] = []
        for start in range(0, len(texts), _BATCH):
            rows = self._rows(list(texts[start : start + _BATCH]), output, more | how)
            found += [self._array(row, output) for row in rows]
            self._notify(time.monotonic() - self._started)
        return found

    def has_prompts(self, output: str, roles: list[dict[str, Any]], texts: Sequence[list[str]]) -> bool:
        """Return whether a prompt changes the first query or document."""
        if not (self._model.get("prompts") or {}).get("names"):
            return False
        pairs = (
            [self.embed(part[:1], output, how)[0] for how in (role, _NO_PROMPT)]
            for role, part in zip(roles, texts, strict=True)
        )
        return any(first.shape != second.shape or abs(first - second).max() > 1e-3 for first, second in pairs)

    def _rows(self, batch: list[str], output: str, more: dict[str, Any]) -> list[Any]:
        if self.roles is False:
            more = {key: value for key, value in more.items() if key != "input_type"}
        try:
            rows = patiently(partial(self._server.embed, batch, output=output, **more))
        except StatusError as error:
            # A server that accepted the role before rejects something else.
            if self.roles is not None or error.status not in (400, 415, 422):
                raise
            self.roles = False
            return self._rows(batch, output, more)
        self.roles = self.roles is not False
        return rows

    def _array(self, row: Sequence[float], output: str) -> Any:
        values = np.asarray(row, np.float32)
        if not np.isfinite(values).all() or not (values.any() or output == "sparse"):
            raise InferctlError("the server returned vectors of zeros, NaN or infinity")
        if output == "sparse":
            from scipy import sparse

            return sparse.csr_matrix(values)
        return values.reshape(-1, int(self._model["token_dimensions"])) if output == "tokens" else values

    def truncated(self, texts: Sequence[str]) -> int | None:
        """Return how many texts have more tokens than the model reads; None if the server does not say it."""
        limit: int | None = (self._server.info.get("limits") or {}).get("max_input_tokens")
        if limit is None:
            return None
        try:
            # A token has at least one byte.
            longer = (text for text in texts if len(text.encode()) > limit - 2)
            return sum(len(self._server.tokenize(text, special_tokens=True)) > limit for text in longer)
        except InferctlError:
            return None


def patiently(request: Callable[[], Found]) -> Found:
    """Return what a request returns. After 429, or an error of the server, it is sent up to six times more."""
    for wait_s in _WAITS_S:
        try:
            return request()
        except StatusError as error:
            if error.status != 429 and error.status < 500:
                raise
            time.sleep(wait_s)
    return request()
