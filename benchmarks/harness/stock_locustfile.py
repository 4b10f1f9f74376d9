"""A typical locustfile: a FastHttpUser posts one fixed text at the highest rate. ceiling.py compares with it."""

from __future__ import annotations

import os

from locust import FastHttpUser, constant, task


class Stock(FastHttpUser):
    host = os.environ["STOCK_URL"]
    wait_time = constant(0)

    @task
    def embed(self) -> None:
        self.client.post(
            "/v1/embeddings", json={"model": "known", "input": "how to tune a ukulele", "encoding_format": "base64"}
        )
