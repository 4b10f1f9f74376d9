"""An embeddings server as people build their first one, and three steps away from it.

    python first_server.py MODEL PORT DATABASE [--work inline|background] [--batch N] [--dtype float32|bfloat16]

FastAPI and sentence-transformers. PostgreSQL has the keys, the counters of the rate limit, the log and the balances.
`--work inline` asks and writes them within each request. `--work background` keeps keys and counters in memory, and a
thread writes log and balances twice a second. `--batch N` computes up to N waiting texts together.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import queue
import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Header, HTTPException
from psycopg_pool import ConnectionPool
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

FLUSH_S = 0.5
LIMIT = 1_000_000  # requests per minute of a key; never reached here
KEY = "select id from keys where digest = %s and not revoked"
COUNT = (
    "insert into counters values (%s, %s, 1) on conflict (key_id, minute) do update set n = counters.n + 1 returning n"
)
LOG = "insert into log (key_id, tokens, seconds) values (%s, %s, %s)"
BILL = "update balances set tokens = tokens + %s where key_id = %s"


class Body(BaseModel):
    input: str


class InlineWork:
    """Everything in the request path, each step a transaction."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool

    def admit(self, digest: str) -> str:
        with self._pool.connection() as connection:
            row = connection.execute(KEY, (digest,)).fetchone()
        if row is None:
            raise HTTPException(401)
        with self._pool.connection() as connection:
            count = connection.execute(COUNT, (row[0], int(time.time() / 60))).fetchone()
        if count[0] > LIMIT:
            raise HTTPException(429)
        return row[0]

    def record(self, key_id: str, tokens: int, seconds: float) -> None:
        with self._pool.connection() as connection:
            connection.execute(LOG, (key_id, tokens, seconds))
        with self._pool.connection() as connection:
            connection.execute(BILL, (tokens, key_id))


class BackgroundWork:
    """Keys and counters in memory; log and balances are written by a thread."""

    def __init__(self, pool: ConnectionPool) -> None:
        with pool.connection() as connection:
            self._keys = dict(connection.execute("select digest, id from keys where not revoked").fetchall())
        self._counts: Counter[tuple[str, int]] = Counter()
        self._rows: queue.SimpleQueue[tuple[str, int, float]] = queue.SimpleQueue()
        threading.Thread(target=self._write, args=(pool,), daemon=True).start()

    def admit(self, digest: str) -> str:
        key_id = self._keys.get(digest)
        if key_id is None:
            raise HTTPException(401)
        cell = key_id, int(time.time() / 60)
        self._counts[cell] += 1
        if self._counts[cell] > LIMIT:
            raise HTTPException(429)
        return key_id

    def record(self, key_id: str, tokens: int, seconds: float) -> None:
        self._rows.put((key_id, tokens, seconds))

    def _write(self, pool: ConnectionPool) -> None:
        while True:
            time.sleep(FLUSH_S)
            rows = [self._rows.get() for _ in range(self._rows.qsize())]
            sums: Counter[str] = Counter()
            for key_id, tokens, _ in rows:
                sums[key_id] += tokens
            with pool.connection() as connection, connection.cursor() as cursor:
                cursor.executemany(LOG, rows)
                cursor.executemany(BILL, [(tokens, key_id) for key_id, tokens in sums.items()])


class Batches:
    """Computes the texts that wait together, up to `size`, on one thread."""

    def __init__(self, model: SentenceTransformer, size: int) -> None:
        self._model, self._size = model, size
        self._waiting: queue.SimpleQueue[tuple[str, Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, text: str) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.put((text, future))
        return future

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self._size and not self._waiting.empty():
                batch.append(self._waiting.get())
            vectors = self._model.encode(
                [text for text, _ in batch], normalize_embeddings=True, show_progress_bar=False, batch_size=self._size
            )
            for (text, future), vector in zip(batch, vectors, strict=True):
                # On this thread: a fast tokenizer must not be used by two threads at a time.
                future.set_result((vector, len(self._model.tokenizer(text)["input_ids"])))


def application(options: argparse.Namespace) -> FastAPI:
    model = SentenceTransformer(options.model, device="cpu", model_kwargs={"dtype": getattr(torch, options.dtype)})
    pool = ConnectionPool(options.database, min_size=8, max_size=8)
    pool.wait()
    work = InlineWork(pool) if options.work == "inline" else BackgroundWork(pool)
    app = FastAPI()
    lock = threading.Lock()  # threads that compute at the same time are slower

    def admit(authorization: str) -> str:
        return work.admit(hashlib.sha256(authorization.removeprefix("Bearer ").encode()).hexdigest())

    def answer(key_id: str, tokens: int, vector: Any, started: float) -> dict[str, Any]:
        work.record(key_id, tokens, time.monotonic() - started)
        data = [{"object": "embedding", "index": 0, "embedding": vector.tolist()}]
        return {"object": "list", "data": data, "model": "minilm", "usage": {"prompt_tokens": tokens}}

    @app.get("/readyz")
    def ready() -> str:
        return "ok"

    if options.batch == 1:

        @app.post("/v1/embeddings")
        def embed(body: Body, authorization: str = Header()) -> dict[str, Any]:
            started, key_id = time.monotonic(), admit(authorization)
            with lock:
                vector = model.encode(body.input, normalize_embeddings=True, show_progress_bar=False)
                tokens = len(model.tokenizer(body.input)["input_ids"])
            return answer(key_id, tokens, vector, started)
    else:
        batches = Batches(model, options.batch)

        @app.post("/v1/embeddings")
        async def embed_in_batches(body: Body, authorization: str = Header()) -> dict[str, Any]:
            started, key_id = time.monotonic(), admit(authorization)
            vector, tokens = await asyncio.wrap_future(batches.submit(body.input))
            return answer(key_id, tokens, vector, started)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("database")
    parser.add_argument("--work", choices=("inline", "background"), default="inline")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    uvicorn.run(application(options), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
