"""The OpenAPI document, built from the pydantic models of the requests, and a self-contained HTML page of it."""

from __future__ import annotations

import html
from typing import Any

from pydantic.json_schema import models_json_schema

import inferctl
from inferctl.serve.embeddings.schemas import EmbeddingRequest, EmbeddingResponse, ErrorResponse
from inferctl.serve.embeddings.served_model import ServedModel

_ERRORS = {
    "400": "The request is invalid. The message names the field.",
    "404": "The model name is unknown.",
    "413": "The body is too large.",
    "415": "The content type is not JSON.",
    "429": "The server is at capacity. Retry after `Retry-After` seconds.",
    "500": "The model could not compute this input.",
    "503": "The server is starting, restarting an engine or shutting down.",
}
_PRIORITY = {
    "name": "x-priority",
    "in": "header",
    "description": "`interactive` (default) or `bulk`. Interactive requests run before bulk requests.",
    "schema": {"type": "string", "enum": ["interactive", "bulk", ""]},
}
_HEADERS = {
    "x-request-id": "The id from the request, or a generated one.",
    "x-inferctl-tokenize-ms": "Milliseconds of tokenization.",
    "x-inferctl-queue-ms": "Milliseconds in the queue.",
    "x-inferctl-inference-ms": "Milliseconds in the engine.",
    "x-inferctl-tokens": "Number of processed tokens.",
}
_GET_ROUTES = {
    "/v1/models": ("List the served model, in OpenAI's format.", "application/json"),
    "/v1/models/{name}": ("Return the served model if it has this name.", "application/json"),
    "/livez": ("200 while the process is live.", "text/plain"),
    "/readyz": ("200 while the server is ready for requests.", "text/plain"),
    "/metrics": ("Prometheus metrics.", "text/plain"),
    "/info": ("Model, precision, attention path, fidelity to fp32, device and limits.", "application/json"),
    "/docs": ("This document as a web page.", "text/html"),
    "/openapi.json": ("This document as JSON.", "application/json"),
}


def document(model: ServedModel) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of this server. The limits of the model are part of it once it is loaded."""
    name = model.name
    models: list[tuple[Any, Any]] = [
        (EmbeddingRequest, "validation"),
        (EmbeddingResponse, "serialization"),
        (ErrorResponse, "serialization"),
    ]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")
    if model.dimensions:
        _add_limits(schemas["$defs"]["EmbeddingRequest"]["properties"], model)
    paths: dict[str, Any] = {"/v1/embeddings": {"post": _embeddings(name)}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{name} - embeddings",
            "version": inferctl.__version__,
            "description": "OpenAI-compatible embeddings.",
        },
        "paths": paths | {path: {"get": _get_operation(path, name)} for path in _GET_ROUTES},
        "components": {"schemas": schemas["$defs"]},
    }


def _add_limits(properties: dict[str, Any], model: ServedModel) -> None:
    """Add the limits to the schema of requests, so that the server accepts every request that matches the schema."""
    _, texts, ids, rows = properties["input"]["anyOf"]
    texts["maxItems"] = rows["maxItems"] = model.max_inputs
    ids["items"]["maximum"] = rows["items"]["items"]["maximum"] = model.vocabulary_size - 1
    number = {"type": "integer"}
    sizes = model.matryoshka
    properties["dimensions"]["anyOf"][0] = (
        {**number, "minimum": 1, "maximum": model.dimensions}
        if sizes is None
        else {**number, "enum": sorted({*(d for d in sizes if d < model.dimensions), model.dimensions})}
    )


def _get_operation(path: str, name: str) -> dict[str, Any]:
    summary, media = _GET_ROUTES[path]
    schema = {"type": "object"} if media == "application/json" else {"type": "string"}
    responses: dict[str, Any] = {"200": {"description": summary, "content": {media: {"schema": schema}}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_"),
        "responses": responses,
    }
    if path in ("/livez", "/readyz"):
        # Probes use only the status, so the body has no schema.
        responses = operation["responses"] = {"200": {"description": summary}, "503": {"description": "Otherwise."}}
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
    wait = {"description": "Seconds until a retry is useful.", "schema": {"type": "integer", "minimum": 1}}
    example = {"model": name, "input": ["first text", "second text"]}
    body = {"schema": {"$ref": "#/components/schemas/EmbeddingRequest"}, "example": example}
    response = {"application/json": {"schema": {"$ref": "#/components/schemas/EmbeddingResponse"}}}
    return {
        "summary": "Compute the embeddings of texts.",
        "operationId": "create_embedding",
        "parameters": [_PRIORITY],
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {
            "200": {"description": "One vector per input, in order.", "headers": headers, "content": response},
            **{status: _error(text) for status, text in _ERRORS.items()},
            "429": {**_error(_ERRORS["429"]), "headers": {"retry-after": wait}},
        },
    }


def _error(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
    }


def page(model: ServedModel) -> str:
    """Return a page with the routes, the fields of a request and an example, without scripts or external files."""
    spec, name = document(model), model.name
    routes = "".join(
        f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td>"
        f"<td>{html.escape(operation['summary'])}</td></tr>"
        for path, methods in spec["paths"].items()
        for method, operation in methods.items()
    )
    fields = "".join(
        f"<tr><td><code>{html.escape(field)}</code></td><td>{html.escape(entry.get('description', ''))}</td></tr>"
        for field, entry in spec["components"]["schemas"]["EmbeddingRequest"]["properties"].items()
    )
    errors = "".join(f"<tr><td>{status}</td><td>{html.escape(text)}</td></tr>" for status, text in _ERRORS.items())
    body = f"""{{"model": "{name}", "input": ["first text", "second text"]}}"""
    example = html.escape(f"curl -s $URL/v1/embeddings -H 'content-type: application/json' -d '{body}'")
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;width:100%}}td{{border-top:1px solid #ccc;padding:.4rem .6rem;vertical-align:top}}
pre{{background:#f4f4f4;padding:.8rem;overflow-x:auto}}
@media(prefers-color-scheme:dark){{body{{background:#111;color:#ddd}}pre{{background:#222}}}}
</style></head><body><h1>{html.escape(name)}</h1>
<p>OpenAI-compatible embeddings. <a href="/openapi.json">/openapi.json</a> is the machine-readable description.
<a href="/info">/info</a> returns the model, the precision and the device in use.</p><pre>{example}</pre>
<h2>Routes</h2><table>{routes}</table><h2>Fields of a request</h2><table>{fields}</table>
<h2>Errors</h2><table>{errors}</table></body></html>
"""
