"""The OpenAPI document, built from the pydantic models that parse the requests, and a page that shows it without fetching anything."""

from __future__ import annotations

import html
from typing import Any

from pydantic.json_schema import models_json_schema

import inferctl
from inferctl.serve.http import EmbeddingRequest, EmbeddingResponse, ErrorResponse

_ERRORS = {
    "400": "The request is wrong; the message says where.",
    "404": "There is no model of that name.",
    "413": "The body is too large.",
    "429": "The queue is full: come back after `Retry-After` seconds.",
    "500": "The model could not compute this input.",
    "503": "Starting, shutting down, or the engine is being started again.",
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
    "/livez": ("200 while the process is worth keeping.", "text/plain"),
    "/readyz": ("200 while embeddings are answered.", "text/plain"),
    "/metrics": ("Prometheus metrics.", "text/plain"),
    "/info": (
        "Model, precision that really runs, attention path, fidelity to fp32, device, limits.",
        "application/json",
    ),
    "/openapi.json": ("This document.", "application/json"),
}


def document(name: str) -> dict[str, Any]:
    """OpenAPI 3.1 of this server."""
    models: list[tuple[Any, Any]] = [
        (EmbeddingRequest, "validation"),
        (EmbeddingResponse, "serialization"),
        (ErrorResponse, "serialization"),
    ]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {"/v1/embeddings": {"post": _embeddings(name)}}
    for path, (summary, media) in _PLAIN.items():
        schema = {"type": "object"} if media == "application/json" else {"type": "string"}
        responses: dict[str, Any] = {"200": {"description": summary, "content": {media: {"schema": schema}}}}
        if path in ("/livez", "/readyz"):
            responses["503"] = {"description": "Not now.", "content": {media: {"schema": schema}}}
        if path == "/info":
            responses["503"] = _error(_ERRORS["503"])
        paths[path] = {
            "get": {"summary": summary, "operationId": path.strip("/").replace("/", "_"), "responses": responses}
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{name} - embeddings",
            "version": inferctl.__version__,
            "description": "OpenAI-compatible embeddings.",
        },
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _embeddings(name: str) -> dict[str, Any]:
    headers = {key: {"description": text, "schema": {"type": "string"}} for key, text in _HEADERS.items()}
    example = {"model": name, "input": ["first text", "second text"]}
    body = {"schema": {"$ref": "#/components/schemas/EmbeddingRequest"}, "example": example}
    answer = {"application/json": {"schema": {"$ref": "#/components/schemas/EmbeddingResponse"}}}
    return {
        "summary": "Embed texts.",
        "operationId": "create_embedding",
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {
            "200": {"description": "One vector per input, in order.", "headers": headers, "content": answer},
            **{status: _error(text) for status, text in _ERRORS.items()},
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
