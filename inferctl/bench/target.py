"""Something that runs and answers at a URL: what it says of itself, and embeddings out of it."""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import re
import struct
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from inferctl.bench import procfs
from inferctl.errors import InferctlError, NotReadyError, UsageError

_ABSENT = (404, 405, 501)
# The load generator knows no proxies either, and a proxy's latency is not the server's.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Target:
    """A server. `info` is its `GET /info`, empty when it has none (it is then no inferctl server); `model` is its name in the API."""

    url: str
    model: str
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def embeddings_url(self) -> str:
        return f"{self.url}/v1/embeddings"

    def embed(self, texts: list[str], timeout_s: float = 120) -> list[tuple[float, ...]]:
        """One vector a text. Raises `InferctlError` when the server refuses or answers something else."""
        body = json.dumps({"model": self.model, "input": texts, "encoding_format": "base64"}).encode()
        answer = _json(self.embeddings_url, timeout_s, body)
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = [_vector(row["embedding"]) for row in rows]
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise InferctlError(
                f"{self.embeddings_url} answered something that is no list of embeddings: {error}"
            ) from None
        if len(vectors) != len(texts):
            raise InferctlError(f"{self.embeddings_url} answered {len(vectors)} embeddings for {len(texts)} texts")
        return vectors


def connect(url: str, timeout_s: float = 10) -> Target:
    """The server at `url`. Raises `UsageError` for a bad URL, `NotReadyError` when nothing answers there or it refuses."""
    url = url.rstrip("/").removesuffix("/v1/embeddings").removesuffix("/v1")
    if not _is_address(url):
        raise UsageError(f"{url!r} is not the address of a server", "give one like `--url t4=http://10.0.0.7:8080`")
    info = _optional(f"{url}/info", timeout_s)
    models = {} if info.get("name") else _optional(f"{url}/v1/models", timeout_s)
    try:
        model = str(info.get("name") or models["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise NotReadyError(
            f"{url} answers, but neither GET /info nor GET /v1/models names a model",
            "is it an OpenAI-compatible embeddings server?",
        ) from None
    return Target(url, model, info)


def _is_address(url: str) -> bool:
    """Whether it has a scheme, a host and perhaps a port and a path, and nothing that an HTTP client would choke on."""
    if re.search(r"[\x00-\x20\x7f@?#]", url):
        return False
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _optional(url: str, timeout_s: float) -> dict[str, Any]:
    """The JSON object at `url`; empty when the server has no such page. Raises `NotReadyError` when there is no server or it refuses."""
    try:
        with _OPENER.open(url, timeout=timeout_s) as response:
            value = json.loads(response.read())
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _ABSENT:
            return {}
        raise NotReadyError(f"{url} answered {error.code} {error.reason}", _advice(error.code)) from None
    except (ValueError, RecursionError):
        return {}
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise NotReadyError(
            f"nothing answers at {url}: {reason}", "start the server first, or check host and port"
        ) from None
    return value if isinstance(value, dict) else {}


def _advice(status: int) -> str:
    if status in (401, 403):
        return "the server wants credentials, and `inferctl bench` sends none: measure it behind its gateway"
    if status in (429, 502, 503, 504):
        return "it may still be loading its model, or be busy: wait until GET /readyz answers 200"
    return "see the server's own log"


def is_local(url: str) -> bool:
    """Whether `url` leads to this machine by its loopback interface; the server then shares cores with the load generator."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except (ValueError, RecursionError):
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def process(url: str) -> int | None:
    """The process of this machine that serves `url`; None when the server is elsewhere or cannot be told."""
    parts = urllib.parse.urlsplit(url)
    return procfs.listener(parts.port or (443 if parts.scheme == "https" else 80)) if is_local(url) else None


def _json(url: str, timeout_s: float, body: bytes) -> dict[str, Any]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            value = json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            raise InferctlError(f"{url} answered {error.code}: {error.read(300).decode(errors='replace')}") from None
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise InferctlError(f"{url} failed: {error}") from None
    if not isinstance(value, dict):
        raise InferctlError(f"{url} answered something that is no JSON object")
    return value


def _vector(embedding: str | list[float]) -> tuple[float, ...]:
    """A vector from a JSON list, or from the base64 of little-endian float32 values."""
    if isinstance(embedding, list):
        return tuple(float(value) for value in embedding)
    content = base64.b64decode(embedding)
    return struct.unpack(f"<{len(content) // 4}f", content)
