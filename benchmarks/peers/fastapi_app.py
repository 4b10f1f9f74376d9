"""sentence-transformers behind FastAPI, a typical implementation. It runs in the virtual environment of the peer.

python fastapi_app.py MODEL PORT
"""

from __future__ import annotations

import sys
import threading

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu", model_kwargs={"dtype": torch.bfloat16})
app = FastAPI()
# Threads of FastAPI's pool that compute at the same time compete for cores. One at a time is faster.
lock = threading.Lock()


class Body(BaseModel):
    input: str | list[str]


@app.get("/health")
def health() -> str:
    return "ok"


@app.post("/v1/embeddings")
def embed(body: Body) -> dict:
    texts = [body.input] if isinstance(body.input, str) else body.input
    with lock:
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    data = [{"object": "embedding", "index": i, "embedding": v.tolist()} for i, v in enumerate(vectors)]
    return {"object": "list", "data": data, "model": "minilm"}


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
