"""The OpenAPI document, built from the pydantic models that parse the requests, and a page that shows it without fetching anything."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import models_json_schema

import inferctl
from inferctl.serve.http import EmbeddingRequest, EmbeddingResponse, ErrorResponse

_ERRORS = {
    "400": "The request is wrong; the message says where.",
    "404": "There is no model of that name.",
    "413": "The body is too large.",
    "415": "The body is said to be something other than JSON.",
    "429": "The queue is full: come back after `Retry-After` seconds.",
    "500": "The model could not compute this input.",
    "503": "Starting, shutting down, or the engine is being started again.",
}
_PRIORITY = {
    "name": "x-priority",
    "in": "header",
    "description": "`bulk` work waits while there is `interactive` work (the default).",
    "schema": {"type": "string", "enum": ["interactive", "bulk", ""]},
}
_HEADERS = {
    "x-request-id": "The request's own id, or a new one.",
    "x-inferctl-tokenize-ms": "Milliseconds spent tokenising.",
    "x-inferctl-queue-ms": "Milliseconds spent waiting for the engine.",
    "x-inferctl-inference-ms": "Milliseconds spent in the engine.",
    "x-inferctl-tokens": "Tokens computed.",
}
_PLAIN = {
    "/v1/models": ("The served model, in OpenAI's list.", "application/json"),
    "/v1/models/{name}": ("The served model, if that is its name.", "application/json"),
    "/livez": ("200 while the process is worth keeping.", "text/plain"),
    "/readyz": ("200 while embeddings are answered.", "text/plain"),
    "/metrics": ("Prometheus metrics.", "text/plain"),
    "/info": (
        "Model, precision that really runs, attention path, fidelity to fp32, device, limits.",
        "application/json",
    ),
    "/docs": ("This document for people.", "text/html"),
    "/openapi.json": ("This document.", "application/json"),
}


@dataclass(frozen=True)
class Facts:
    """What one server takes, to be said exactly: token ids below `vocabulary`, at most `max_inputs` inputs.

    `dimensions`: those that vectors may have, or None when any number up to `longest` will do.
    """

    vocabulary: int
    max_inputs: int
    longest: int
    dimensions: tuple[int, ...] | None


def document(name: str, facts: Facts | None = None) -> dict[str, Any]:
    """OpenAPI 3.1 of this server. Without `facts` it says no more of requests than their types."""
    models: list[tuple[Any, Any]] = [
        (EmbeddingRequest, "validation"),
        (EmbeddingResponse, "serialization"),
        (ErrorResponse, "serialization"),
    ]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")
    if facts:
        _narrow(schemas["$defs"]["EmbeddingRequest"]["properties"], facts)
    paths: dict[str, Any] = {"/v1/embeddings": {"post": _embeddings(name)}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{name} - embeddings",
            "version": inferctl.__version__,
            "description": "OpenAI-compatible embeddings.",
        },
        "paths": paths | {path: {"get": _plain(path, name)} for path in _PLAIN},
        "components": {"schemas": schemas["$defs"]},
    }


def _narrow(properties: dict[str, Any], facts: Facts) -> None:
    """Put a server's own limits into the schema of its requests, so that what keeps to the schema is answered."""
    _, texts, ids, rows = properties["input"]["anyOf"]
    texts["maxItems"] = rows["maxItems"] = facts.max_inputs
    ids["items"]["maximum"] = rows["items"]["items"]["maximum"] = facts.vocabulary - 1
    number = {"type": "integer"}
    allowed = (
        {**number, "enum": sorted(facts.dimensions)}
        if facts.dimensions
        else {**number, "minimum": 1, "maximum": facts.longest}
    )
    properties["dimensions"]["anyOf"][0] = allowed


def _plain(path: str, name: str) -> dict[str, Any]:
    summary, media = _PLAIN[path]
    schema = {"type": "object"} if media == "application/json" else {"type": "string"}
    responses: dict[str, Any] = {"200": {"description": summary, "content": {media: {"schema": schema}}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_"),
        "responses": responses,
    }
    if path in ("/livez", "/readyz"):
        # Probes are judged by their status; the word in the body is for people.
        responses = operation["responses"] = {"200": {"description": summary}, "503": {"description": "Not now."}}
    if path == "/info":
        responses["503"] = _error(_ERRORS["503"])
    if "{name}" in path:
        operation["operationId"] = "v1_model"
        operation["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "example": name}
        ]
        responses["404"] = _error(_ERRORS["404"])
    return operation


def _embeddings(name: str) -> dict[str, Any]:
    headers = {key: {"description": text, "schema": {"type": "string"}} for key, text in _HEADERS.items()}
    wait = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
    example = {"model": name, "input": ["first text", "second text"]}
    body = {"schema": {"$ref": "#/components/schemas/EmbeddingRequest"}, "example": example}
    answer = {"application/json": {"schema": {"$ref": "#/components/schemas/EmbeddingResponse"}}}
    return {
        "summary": "Embed texts.",
        "operationId": "create_embedding",
        "parameters": [_PRIORITY],
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {
            "200": {"description": "One vector per input, in order.", "headers": headers, "content": answer},
            **{status: _error(text) for status, text in _ERRORS.items()},
            "429": {**_error(_ERRORS["429"]), "headers": {"retry-after": wait}},
        },
    }


def _error(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
    }


def page(name: str) -> str:
    """A page with the routes, the request's fields and an example; no script and nothing from elsewhere."""
    spec = document(name)
    routes = "".join(
        f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td><td>{html.escape(operation['summary'])}</td></tr>"
        for path, methods in spec["paths"].items()
        for method, operation in methods.items()
    )
    fields = "".join(
        f"<tr><td><code>{html.escape(field)}</code></td><td>{html.escape(entry.get('description', ''))}</td></tr>"
        for field, entry in spec["components"]["schemas"]["EmbeddingRequest"]["properties"].items()
    )
    errors = "".join(f"<tr><td>{status}</td><td>{html.escape(text)}</td></tr>" for status, text in _ERRORS.items())
    example = html.escape(
        f"""curl -s $URL/v1/embeddings -H 'content-type: application/json' -d '{{"model": "{name}", "input": ["first text", "second text"]}}'"""
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;width:100%}}td{{border-top:1px solid #ccc;padding:.4rem .6rem;vertical-align:top}}
pre{{background:#f4f4f4;padding:.8rem;overflow-x:auto}}@media(prefers-color-scheme:dark){{body{{background:#111;color:#ddd}}pre{{background:#222}}}}
</style></head><body><h1>{html.escape(name)}</h1><p>OpenAI-compatible embeddings. The machine-readable description is
<a href="/openapi.json">/openapi.json</a>; what really runs is at <a href="/info">/info</a>.</p><pre>{example}</pre>
<h2>Routes</h2><table>{routes}</table><h2>Fields of a request</h2><table>{fields}</table><h2>Errors</h2><table>{errors}</table></body></html>
"""
