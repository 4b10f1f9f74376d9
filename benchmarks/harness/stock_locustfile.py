"""What people write for Locust: a FastHttpUser that posts one fixed text as often as it can. For ceiling.py to compare with."""

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
