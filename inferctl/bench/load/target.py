"""Connect to a server at a URL, read what it reports about itself, and request embeddings or scores from it.

Servers differ in their paths and in how they name their model:

    inferctl                     GET /info        POST /v1/embeddings              POST /v1/rerank
    vLLM                         GET /v1/models   POST /v1/embeddings              POST /v1/rerank
    infinity                     GET /models      POST /embeddings                 POST /rerank
    text-embeddings-inference    GET /info        POST /v1/embeddings, else /embed POST /rerank, other keys
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import itertools
import math
import re
import struct
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from inferctl.bench.load import generation, process_usage
from inferctl.bench.load.generation import GenerationApi
from inferctl.bench.load.http_json import (
    ABSENT,
    WITHOUT_LIMITS,
    Body,
    Info,
    ServerAccess,
    StatusError,
    get_json,
    hint,
    post,
    send,
)
from inferctl.config.spec import Task
from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.models import divergence, output_vectors
from inferctl.models.divergence import NoLogprobsError, Scored

PATHS: Mapping[Task, tuple[str, ...]] = {
    "embed": ("/v1/embeddings", "/embeddings", "/embed"),
    "rerank": ("/v1/rerank", "/rerank"),
    "classify": ("/classify",),
    "generate": ("/v1/chat/completions", "/v1/completions"),
}
_SERVES: Mapping[Task, str] = {
    "embed": "embeddings",
    "rerank": "reranking",
    "classify": "classification",
    "generate": "generation",
}
# HTTP statuses of a server that rejects an unknown key of a request.
_INVALID = (400, 415, 422)
_PROBE_S = 60.0
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class ServerConnection:
    """The connection to a server that is measured: its address, what it reports, and the form of its requests.

    `info` is its `GET /info`, or the known facts under the same keys for servers other than inferctl. `model` is the
    name of its model in the API. `path` is the endpoint for the task. `base64` is whether it can encode vectors in
    base64. `documents_key` is the key of the documents of a rerank request. `generation` is what a generation server
    accepts.
    """

    url: str
    model: str
    info: Info = field(default_factory=dict)
    path: str = PATHS["embed"][0]
    base64: bool = True
    access: ServerAccess = field(default_factory=ServerAccess)
    task: Task = "embed"
    documents_key: Literal["documents", "texts"] = "documents"
    generation: GenerationApi = field(default_factory=GenerationApi)

    @property
    def endpoint_url(self) -> str:
        return f"{self.url}{self.path}"

    @property
    def emulated(self) -> bool:
        """Whether the server says that its hardware emulates the precision."""
        return bool((self.info.get("precision") or {}).get("level") == "emulated")

    def body(self, texts: list[str], output_tokens: int = 1) -> Body:
        """Return the JSON body of a request for embeddings, for rerank scores or for a completion.

        They are the embeddings of `texts`, the scores of the query `texts[0]` and the documents `texts[1:]`, or
        `output_tokens` tokens after the prompt, which is in two parts.
        """
        if self.task == "generate":
            return self.generation.body(self.path, self.model, texts, output_tokens)
        if self.task == "rerank":
            options = {"truncate": True} if self.documents_key == "texts" else {"model": self.model}
            return {"query": texts[0], self.documents_key: texts[1:]} | options
        if self.task == "classify":
            return {"model": self.model, "input": texts}
        if self.path == "/embed":
            return {"inputs": texts, "truncate": True}
        encoding = {"encoding_format": "base64"} if self.base64 else {}
        return {"model": self.model, "input": texts} | encoding

    def of_name(self, name: str, task: Task) -> ServerConnection:
        """Return the connection for requests that name another model or adapter of this server."""
        path = self.path if task == self.task else PATHS[task][0]
        return replace(self.of_names([name]), model=name, task=task, path=path)

    def of_names(self, names: Iterable[str]) -> ServerConnection:
        """Return the connection with the information that all of these models of the server have in common."""
        if not (found := [each for each in self.info.get("models", ()) if each["name"] in names]):
            return self
        common = {key: value for key, value in found[0].items() if all(each.get(key) == value for each in found)}
        return replace(self, info={key: self.info[key] for key in self.info if key not in found[0]} | common)

    def tasks(self) -> dict[str, Task]:
        """Return the models and adapters that the server lists, without other names for them, each with its task."""
        found, known = {str(each["name"]): _task(each, None) for each in self.info.get("models", ())}, set[str]()
        if found:
            return found
        for entry in _listed(self.url, 10, self.access):
            # The root of another name for a model is that model or its folder.
            root = str(entry.get("root") or entry["id"])
            if root not in known:
                found[entry["id"]] = entry["task"] if entry.get("task") in PATHS else self.task
            known |= {root, entry["id"]}
        return found or {self.model: self.task}

    def check_prompts(self, name: str | None, query_share: float | None) -> None:
        """Raise `UsageError` if the model does not have the prompts of a load, or the server does not report them.

        Such a server may ignore the keys of a request, so the receipt would not say what was measured.
        """
        if name is None and query_share is None:
            return
        names: list[str] = ((self.info.get("model") or {}).get("prompts") or {}).get("names") or []
        if not names:
            key = "query_share" if name is None else "prompt_name"
            raise UsageError(f"{self.url} reports no prompts of its model", f"remove `load.{key}` from the plan")
        if name is not None and name not in names:
            raise UsageError(f"`load.prompt_name`: the model has no prompt {name!r}", f"use one of {', '.join(names)}")

    def request(self, texts: list[str], timeout_s: float = 120) -> Sequence[object]:
        """Request what `body(texts)` requests, and return the vectors, the scores or the chunks of a stream.

        Raises `InferctlError`.
        """
        if self.task == "generate":
            return self.generate(texts, timeout_s)
        if self.task == "classify":
            return self.classify(texts, timeout_s)
        return self.rerank(texts, timeout_s) if self.task == "rerank" else self.embed(texts, timeout_s)

    def check_limit(self) -> None:
        """Send one request, after others got 429. Raises `InferctlError` if the key is above its limit."""
        try:
            self.request(["ready", "ready"] if self.task in ("rerank", "generate") else ["ready"], _PROBE_S)
        except StatusError as error:
            if error.is_limit:
                raise InferctlError(
                    f"a limit of the API key stopped the load; {WITHOUT_LIMITS}: {error.message}"
                ) from None
        except InferctlError:
            return  # overload, which the records show

    def generate(self, texts: list[str], timeout_s: float = 120) -> list[Body]:
        """Return the chunks of the stream of a completion. Raises `InferctlError` unless the stream is complete."""
        content = send(self.endpoint_url, timeout_s, self.body(texts), self.access)
        return generation.chunks(content, self.endpoint_url)

    def rerank(self, texts: list[str], timeout_s: float = 120) -> list[float]:
        """Return the score of each document for the query `texts[0]`. The documents are `texts[1:]`.

        Raises `InferctlError` if the request is rejected or the response is invalid: without one finite score per
        document, or not sorted.
        """
        response = post(self.endpoint_url, timeout_s, self.body(texts), self.access)
        try:
            if self.documents_key == "texts":
                results = [(int(row["index"]), float(row["score"])) for row in response]
            else:
                results = [(int(row["index"]), float(row["relevance_score"])) for row in response["results"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InferctlError(f"the response of {self.endpoint_url} is not a list of scores: {error}") from None
        count, scores = len(texts) - 1, dict(results)
        if len(results) != count or set(scores) != set(range(count)):
            raise InferctlError(f"{self.endpoint_url} returned {len(results)} results for {count} documents")
        if not all(map(math.isfinite, scores.values())):
            raise InferctlError(f"{self.endpoint_url} returned scores with NaN or infinity")
        if any(before < after for (_, before), (_, after) in itertools.pairwise(results)):
            raise InferctlError(f"{self.endpoint_url} returned results that are not sorted by score")
        return [scores[index] for index in range(count)]

    def classify(self, texts: list[str], timeout_s: float = 120) -> list[list[float]]:
        """Return the scores of all labels for each text. Raises `InferctlError` as `embed` does."""
        response = post(self.endpoint_url, timeout_s, self.body(texts), self.access)
        try:
            rows = sorted(response["data"], key=lambda row: row["index"])
            scores = [[float(score) for score in row["probs"]] for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise InferctlError(f"the response of {self.endpoint_url} is not a list of scores: {error}") from None
        if len(scores) != len(texts):
            raise InferctlError(f"{self.endpoint_url} returned the scores of {len(scores)} texts for {len(texts)}")
        return scores

    def embed(
        self, texts: list[str], timeout_s: float = 120, output: str | None = None, **more: object
    ) -> list[tuple[float, ...]]:
        """Return one vector per text, of `output` or of the model's first output. `more`: other keys of the request.

        Raises `InferctlError` if the request is rejected or the response is invalid.
        """
        response = post(self.endpoint_url, timeout_s, self.body(texts) | more, self.access)
        try:
            if self.path == "/embed":
                vectors = [_vector(row) for row in response]
            else:
                rows = sorted(response["data"], key=lambda row: row["index"])
                vectors = [self._vector(row, output or self.output) for row in rows]
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise InferctlError(f"the response of {self.endpoint_url} is not a list of embeddings: {error}") from None
        if len(vectors) != len(texts):
            raise InferctlError(f"{self.endpoint_url} returned {len(vectors)} embeddings for {len(texts)} texts")
        return vectors

    @property
    def output(self) -> str:
        """The output of a model for embeddings that is measured: a dense vector, if it has one."""
        trained: list[str] = (self.info.get("model") or {}).get("trained_outputs") or ["dense"]
        return trained[0]

    def _vector(self, entry: Body, output: str) -> tuple[float, ...]:
        if output == "dense":
            return _vector(entry["embedding"])
        size = int(self.info["model"]["vocabulary_size"])
        return tuple(output_vectors.read(entry, output, size))

    def tokenize(self, text: str, timeout_s: float = 120, special_tokens: bool = False) -> list[int]:
        """Return the tokens of a text. Raises `InferctlError` if the server has no tokenizer.

        The endpoint is that of vLLM and SGLang (`prompt`) and of llama.cpp's server (`content`).
        """
        body: Body = {"model": self.model, "prompt": text, "content": text}
        body |= dict.fromkeys(("add_special_tokens", "add_special"), special_tokens)
        response = post(f"{self.url}/tokenize", timeout_s, body, self.access)
        try:
            return [int(token) for token in response["tokens"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InferctlError(f"the response of {self.url}/tokenize is not a list of tokens: {error!r}") from None

    def score(self, ids: Sequence[int], timeout_s: float = 120) -> Scored:
        """Return the log-probabilities of the next tokens of a prompt.

        Raises `NoLogprobsError` if the server rejects the request or does not report them, and `InferctlError` if it
        fails or they are invalid.
        """
        body = divergence.request(self.model, ids)
        try:
            return divergence.read_served(post(f"{self.url}/v1/completions", timeout_s, body, self.access), ids)
        except StatusError as error:
            if error.status in (*ABSENT, *_INVALID):
                raise NoLogprobsError(f"the server reports no log-probabilities of a prompt: {error.message}") from None
            raise


def connect(url: str, timeout_s: float = 10, access: ServerAccess | None = None) -> ServerConnection:
    """Return the server at `url`. The URL may include the endpoint for the task.

    A server other than inferctl receives a request with one text. Its response shows the endpoint, and that the
    server is ready. Raises `UsageError` for an invalid URL, and `NotReadyError` if no server responds or it rejects
    requests.
    """
    access = access or ServerAccess()
    url = url.rstrip("/")
    path = next((suffix for paths in PATHS.values() for suffix in paths if url.endswith(suffix)), None)
    url = url.removesuffix(path or "").removesuffix("/v1")
    if not _is_address(url):
        raise UsageError(f"{url!r} is not the URL of a server", "pass one such as http://10.0.0.7:8080")
    info = get_json(f"{url}/info", timeout_s, access)
    task = _task(info, path)
    if info.get("name"):
        models = {str(each["name"]): each for each in info.get("models", ())}
        name = access.model or str(next(iter(models), info["name"]))
        task = _task(models.get(name, info), path)
        known = ServerConnection(url, name, info, path or PATHS[task][0], access=access, task=task).of_names([name])
        return _with_api(_probe(known, path)) if task == "generate" else known
    listed = next(iter(_listed(url, timeout_s, access)), {})
    model = access.model or info.get("model_id") or listed.get("id")
    if not model:
        raise NotReadyError(
            f"{url} responds, but none of GET /info, /v1/models and /models names a model",
            "check that it serves a model, and pass the name of its model with `--served-model NAME`",
        )
    described = ServerConnection(url, str(model), _describe(info), access=access, task=task)
    if isinstance(context := listed.get("max_model_len"), int):
        described.info["limits"] = {"max_context_tokens": context}
    try:
        return _with_api(_probe(described, path))
    except NotReadyError as error:
        # Nothing but a request shows whether an unknown server generates text.
        if path or task != "embed" or info:
            raise
        try:
            return _with_api(_probe(replace(described, task="generate"), None))
        except NotReadyError:
            raise error from None


def _with_api(server: ServerConnection) -> ServerConnection:
    """Return `server` with the form of its requests as the `api` key of its information."""
    api: dict[str, Any] = {"path": server.path, "model": server.model}
    if server.task == "embed":
        api["encoding_format"] = "base64" if server.base64 and server.path != "/embed" else "float"
    if server.task == "generate":
        api |= asdict(server.generation)
    return replace(server, info=server.info | {"api": api})


def _task(info: Info, path: str | None) -> Task:
    """Return the task of the endpoint `path`, else the one that the server reports: embed if it reports none."""
    if path:
        return next(task for task, paths in PATHS.items() if path in paths)
    if (task := info.get("task")) in ("classify", "generate"):
        return "classify" if task == "classify" else "generate"
    # The second one is that of text-embeddings-inference.
    return "rerank" if info.get("task") == "rerank" or "reranker" in (info.get("model_type") or ()) else "embed"


def _listed(url: str, timeout_s: float, access: ServerAccess) -> list[Info]:
    """Return the entries of the models that the server lists; empty if it has no list."""
    for page in ("/v1/models", "/models"):
        with contextlib.suppress(KeyError, TypeError):
            if entries := get_json(f"{url}{page}", timeout_s, access)["data"]:
                return [{**entry, "id": str(entry["id"])} for entry in entries]
    return []


def _describe(info: Mapping[str, Any]) -> Info:
    """Return `GET /info` of text-embeddings-inference under inferctl's keys; empty for other servers."""
    if not isinstance(info.get("model_id"), str):
        return {}
    known: Info = {"software": f"text-embeddings-inference {info.get('version', '')}".strip()}
    known["model"] = {"source": info["model_id"]}
    if precision := _PRECISIONS.get(str(info.get("model_dtype"))):
        known["precision"] = {"effective": precision, "reason": f"GET /info: model_dtype {info['model_dtype']}"}
    if isinstance(info.get("max_input_length"), int):
        known["limits"] = {"max_input_tokens": info["max_input_length"]}
    return known


def _probe(server: ServerConnection, path: str | None) -> ServerConnection:
    """Return `server` with the first path and form of a request that it accepts. Raises `NotReadyError`."""
    absent: list[StatusError] = []
    for candidate in (path,) if path else PATHS[server.task]:
        try:
            return _check(replace(server, path=candidate))
        except StatusError as error:
            # A model without a chat template has no chat; vLLM says so with a 400.
            no_chat = server.task == "generate" and "chat template" in error.message
            if error.status not in ABSENT and not no_chat:
                advice = WITHOUT_LIMITS if error.is_limit else hint(error.status, server.access)
                raise NotReadyError(error.message, advice) from None
            absent.append(error)
        except InferctlError as error:
            raise NotReadyError(error.message, f"check that it serves {_SERVES[server.task]}") from None
    raise NotReadyError(
        f"{server.url} has no endpoint for {_SERVES[server.task]}: {absent[0].message}",
        f"pass the URL with its path, as in `--url NAME=http://10.0.0.7:8080{PATHS[server.task][1]}`, "
        "and check `--served-model`",
    )


def _check(server: ServerConnection) -> ServerConnection:
    """Return `server` with a form of a request that it accepts.

    For embeddings, this is the encoding base64, else float. For reranking, it is the key of the documents. For
    generation, these are the extensions that the server accepts.
    """
    if server.task == "generate":
        return _check_generation(server)
    texts = ["ready", "ready"] if server.task == "rerank" else ["ready"]
    try:
        server.request(texts, _PROBE_S)
    except StatusError as error:
        if error.status not in _INVALID or server.path == "/embed":
            raise
        server = replace(server, base64=False, documents_key="texts")
        server.request(texts, _PROBE_S)
    return server


def _check_generation(server: ServerConnection) -> ServerConnection:
    """Return `server` with the extensions that it accepts. Raises what its last response is, if it accepts none."""
    for api in (server.generation, *server.generation.smaller()):
        server = replace(server, generation=api)
        try:
            server.generate(["ready", "ready"], _PROBE_S)
            return server
        except StatusError as error:
            if error.status not in (*_INVALID, 500):  # some servers return 500 for a role that a template rejects
                raise
            rejected = error
    raise rejected


def _is_address(url: str) -> bool:
    """Return whether `url` has a scheme, a host, and no part that an HTTP client cannot send."""
    if re.search(r"[\x00-\x20\x7f@?#]", url):
        return False
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def is_local(url: str) -> bool:
    """Return whether `url` is an address of this machine's loopback interface.

    Such a server shares cores with the load generator.
    """
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except (ValueError, RecursionError):
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def local_pid(url: str) -> int | None:
    """Return the process of this machine that serves `url`; None if it is elsewhere or unknown."""
    parts = urllib.parse.urlsplit(url)
    return process_usage.listener(parts.port or (443 if parts.scheme == "https" else 80)) if is_local(url) else None


def _vector(embedding: str | list[float]) -> tuple[float, ...]:
    """Return a vector from a JSON list, or from the base64 of little-endian float32 values."""
    if isinstance(embedding, list):
        return tuple(float(value) for value in embedding)
    content = base64.b64decode(embedding)
    return struct.unpack(f"<{len(content) // 4}f", content)
