"""Asks vLLM for the next tokens of each adapter before the server is ready, and compares them with fp32.

The supervisor runs the reference and leaves its output in a file. The edge, in vLLM's process, waits for it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Scope

from inferctl.core import outputs
from inferctl.core.errors import InferctlError
from inferctl.models import divergence

FILE = "adapters.json"
_POLL_S = 0.1


async def request(app: ASGIApp, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
    """Return status and body of the response of an application in this process, to a POST if there is a body."""
    status, parts = 500, []

    async def receive() -> Message:
        return {"type": "http.request", "body": orjson.dumps(body) if body else b""}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    key = os.environ.get("VLLM_API_KEY", "")
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST" if body else "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode())],
        "server": None,
        "client": None,
    }
    await app(scope, receive, send)
    return status, b"".join(parts)
