"""A server at a URL: what it says about itself, and embeddings from it.

Servers differ in their paths and in how they name their model:

    inferctl                     GET /info        POST /v1/embeddings
    vLLM                         GET /v1/models   POST /v1/embeddings
    infinity                     GET /models      POST /embeddings
    text-embeddings-inference    GET /info        POST /v1/embeddings, else /embed
"""

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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from inferctl.bench.load import procfs
from inferctl.errors import InferctlError, NotReadyError, UsageError

PATHS = ("/v1/embeddings", "/embeddings", "/embed")
_ABSENT = (404, 405, 501)
# Statuses of a server that rejects a key of the request which it does not know.
_INVALID = (400, 415, 422)
_PROBE_S = 60.0
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# The load generator knows no proxies either, and a proxy's latency is not the server's.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Access:
    """What requests to servers at --url need: headers (with secrets, so never shown or written), and the model name."""

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    model: str | None = None

    def without_secrets(self, text: str) -> str:
        """Return `text` with `***` in place of each header value and key: a server may quote them in an error."""
        for value in self.headers.values():
            for secret in (value, value.rpartition(" ")[2]):
                text = text.replace(secret, "***") if len(secret) > 3 else text
        return text


class _StatusError(InferctlError):
    """The server answered with an HTTP status that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Target:
    """A server. `info` is its `GET /info`; for servers that are not inferctl's, what is known, under the same keys.

    `model` is its name in the API, `path` where it receives texts, `base64` whether it can send vectors in base64.
    """

    url: str
    model: str
    info: dict[str, Any] = field(default_factory=dict)
    path: str = PATHS[0]
    base64: bool = True
    access: Access = field(default_factory=Access)

    @property
    def embeddings_url(self) -> str:
        return f"{self.url}{self.path}"

    def body(self, texts: list[str]) -> dict[str, Any]:
        """Return the JSON body of a request for the embeddings of `texts`."""
        if self.path == "/embed":
            return {"inputs": texts, "truncate": True}
        encoding = {"encoding_format": "base64"} if self.base64 else {}
        return {"model": self.model, "input": texts} | encoding

    def embed(self, texts: list[str], timeout_s: float = 120) -> list[tuple[float, ...]]:
        """One vector a text. Raises `InferctlError` when the server refuses or answers something else."""
        answer = _post(self.embeddings_url, timeout_s, self.body(texts), self.access)
        try:
            if self.path == "/embed":
                vectors = [_vector(row) for row in answer]
            else:
                rows = sorted(answer["data"], key=lambda row: row["index"])
                vectors = [_vector(row["embedding"]) for row in rows]
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise InferctlError(
                f"{self.embeddings_url} answered something that is no list of embeddings: {error}"
            ) from None
        if len(vectors) != len(texts):
            raise InferctlError(f"{self.embeddings_url} answered {len(vectors)} embeddings for {len(texts)} texts")
        return vectors


def connect(url: str, timeout_s: float = 10, access: Access | None = None) -> Target:
    """Return the server at `url`, which may end with the path that receives texts.

    A server that is not inferctl's receives a request for one embedding, which shows its path and that it is ready.
    Raises `UsageError` for a bad URL, `NotReadyError` if nothing answers there or the server rejects requests.
    """
    access = access or Access()
    url = url.rstrip("/")
    path = next((one for one in PATHS if url.endswith(one)), None)
    url = url.removesuffix(path or "").removesuffix("/v1")
    if not _is_address(url):
        raise UsageError(f"{url!r} is not the address of a server", "give one like `--url t4=http://10.0.0.7:8080`")
    info = _optional(f"{url}/info", timeout_s, access)
    if info.get("name"):
        return Target(url, access.model or str(info["name"]), info, path or PATHS[0], access=access)
    model = access.model or info.get("model_id") or _listed(url, timeout_s, access)
    if not model:
        raise NotReadyError(
            f"{url} answers, but none of GET /info, /v1/models and /models names a model",
            "is it an embeddings server? Give the name of its model with `--served-model NAME`",
        )
    found = _probed(Target(url, str(model), access=access), path)
    encoding = "base64" if found.base64 and found.path != "/embed" else "float"
    api = {"path": found.path, "model": found.model, "encoding_format": encoding}
    return replace(found, info=_described(info) | {"api": api})


def _listed(url: str, timeout_s: float, access: Access) -> str | None:
    """Return the first model that the server lists."""
    for page in ("/v1/models", "/models"):
        try:
            return str(_optional(f"{url}{page}", timeout_s, access)["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            continue
    return None


def _described(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what text-embeddings-inference says in `GET /info`, under inferctl's keys; nothing for other servers."""
    if not isinstance(info.get("model_id"), str):
        return {}
    known: dict[str, Any] = {"software": f"text-embeddings-inference {info.get('version', '')}".strip()}
    known["model"] = {"source": info["model_id"]}
    if precision := _PRECISIONS.get(str(info.get("model_dtype"))):
        known["precision"] = {"effective": precision, "reason": f"GET /info: model_dtype {info['model_dtype']}"}
    if isinstance(info.get("max_input_length"), int):
        known["limits"] = {"max_input_tokens": info["max_input_length"]}
    return known


def _probed(server: Target, path: str | None) -> Target:
    """Return `server` with the first path, and the encoding, that give an embedding. Raises `NotReadyError`."""
    absent: list[_StatusError] = []
    for candidate in (path,) if path else PATHS:
        made = replace(server, path=candidate)
        try:
            return _answering(made)
        except _StatusError as error:
            if error.status not in _ABSENT:
                raise NotReadyError(error.message, _advice(error.status)) from None
            absent.append(error)
        except InferctlError as error:
            raise NotReadyError(error.message, "is it an embeddings server?") from None
    raise NotReadyError(
        f"{server.url} has no endpoint for embeddings: {absent[0].message}",
        "give the whole URL, as in `--url NAME=http://10.0.0.7:8080/embeddings`, and check `--served-model`",
    )


def _answering(server: Target) -> Target:
    try:
        server.embed(["ready"], _PROBE_S)
    except _StatusError as error:
        if error.status not in _INVALID or server.path == "/embed":
            raise
        server = replace(server, base64=False)
        server.embed(["ready"], _PROBE_S)
    return server


def _is_address(url: str) -> bool:
    """Whether it has a scheme, a host and perhaps a port and a path, and nothing that an HTTP client would choke on."""
    if re.search(r"[\x00-\x20\x7f@?#]", url):
        return False
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _optional(url: str, timeout_s: float, access: Access) -> dict[str, Any]:
    """The JSON object at `url`; empty when the server has no such page. Raises `NotReadyError` when there is no server or it refuses."""
    try:
        with _OPENER.open(_request(url, access), timeout=timeout_s) as response:
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


def _request(url: str, access: Access, body: bytes | None = None) -> urllib.request.Request:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} if body else {})
    for name, value in access.headers.items():
        # A redirect to another host must not receive them.
        request.add_unredirected_header(name, value)
    return request


def _advice(status: int) -> str:
    if status in (401, 403):
        return (
            "the server requires credentials: name the variable that holds its API key with `--api-key-env NAME`, "
            "or give `--header 'Name: value'`"
        )
    if status in (429, 502, 503, 504):
        return (
            "the server may be loading its model, or be busy: wait until GET /readyz, or its GET /health, answers 200"
        )
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


def _post(url: str, timeout_s: float, body: Mapping[str, Any], access: Access) -> Any:
    try:
        with _OPENER.open(_request(url, access, json.dumps(body).encode()), timeout=timeout_s) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            said = access.without_secrets(error.read(300).decode(errors="replace"))
        raise _StatusError(error.code, f"{url} answered {error.code}: {said}") from None
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise InferctlError(f"{url} failed: {error}") from None


def _vector(embedding: str | list[float]) -> tuple[float, ...]:
    """A vector from a JSON list, or from the base64 of little-endian float32 values."""
    if isinstance(embedding, list):
        return tuple(float(value) for value in embedding)
    content = base64.b64decode(embedding)
    return struct.unpack(f"<{len(content) // 4}f", content)
