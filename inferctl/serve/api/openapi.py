"""The OpenAPI document, built from the pydantic models of the requests, and the HTML page of it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import inferctl
from inferctl.reading.space import HEADER
from inferctl.serve.api import docs_page
from inferctl.serve.api.endpoint import Endpoint
from inferctl.serve.api.schemas import ErrorResponse
from inferctl.serve.api.served_model import ServedModel

_ERRORS = {
    "400": "The request is invalid. The message names the field.",
    "404": "The model name is unknown.",
    "412": "The vectors are of another space than those of the header `x-inferctl-space`.",
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
_SPACE = {
    "name": HEADER,
    "in": "header",
    "description": "Names of vector spaces, comma separated. If the vectors are of another one, the response is 412.",
    "schema": {"type": "string"},
}
_HEADERS = {
    HEADER: "The names of the spaces of the vectors, comma separated.",
    "x-request-id": "The id from the request, or a generated one.",
    "x-inferctl-tokenize-ms": "Milliseconds of tokenization.",
    "x-inferctl-queue-ms": "Milliseconds in the queue.",
    "x-inferctl-inference-ms": "Milliseconds in the engine.",
    "x-inferctl-tokens": "Number of processed tokens.",
    "x-inferctl-cached-tokens": "Number of those that the cache had, if any.",
}
_JSON = "application/json"
_GET_ROUTES = {
    "/v1/models": ("List the served models, in OpenAI's format.", _JSON),
    "/v1/models/{name}": ("Return the served model of this name.", _JSON),
    "/": ("Name and version of the server, and where everything is.", _JSON),
    "/livez": ("200 while the process is live.", "text/plain"),
    "/readyz": ("200 while the server is ready for requests.", "text/plain"),
    "/health": ("The same as /readyz.", "text/plain"),
    "/metrics": ("Prometheus metrics.", "text/plain"),
    "/info": ("Model, precision, attention path, fidelity to fp32, device and limits.", _JSON),
    "/docs": ("This document as a web page.", "text/html"),
    "/openapi.json": ("This document as JSON.", _JSON),
}


# What the models of a server have at each path.
_At: TypeAlias = Mapping[str, Sequence[tuple[ServedModel, Endpoint]]]


def document(name: str, at: _At) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server. The limits of a model are part of it once that is loaded.

    A request that several models take has no limits, and must name one.
    """
    every = [found for each in at.values() for found in each]
    kinds: list[tuple[Any, Any]] = [(ErrorResponse, "serialization")]
    takers: dict[str, dict[int, ServedModel]] = {}  # of the name of a schema
    for model, endpoint in every:
        request, response = endpoint.bodies
        kinds += [(request, "validation"), (response, "serialization"), (endpoint.errors[1], "serialization")]
        for schema in (request.__name__, *(("TextOptions", "Sentences") if model.task == "embed" else ())):
            takers.setdefault(schema, {})[model.number] = model
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    definitions = schemas["$defs"]
    for schema, models in takers.items():
        if schema not in definitions:
            continue
        model, *others = models.values()
        if not others and model.vocabulary_size:  # an engine is ready
            _add_limits(definitions[schema], model)
        elif others and "model" in definitions[schema]["properties"]:
            names = [each for taker in models.values() for each in taker.names]
            definitions[schema]["properties"]["model"] = {"type": "string", "enum": names}
            definitions[schema].setdefault("required", []).append("model")
    paths = {path: {"get": _get(path, every[0][0].name)} for path in _GET_ROUTES}
    for path, found in at.items():
        paths.setdefault(path, {})["post"] = _post(path, found)
    return {
        "openapi": "3.1.0",
        "info": {"title": name, "version": inferctl.__version__},
        "paths": paths,
        "components": {"schemas": definitions},
    }


def _add_limits(schema: dict[str, Any], model: ServedModel) -> None:
    """Add the limits to the schema of requests, so that the server accepts every request that matches the schema."""
    properties = schema["properties"]
    prompts = {"prompt_name": model.prompts.names, "input_type": model.prompts.input_types}
    for name, found in properties.items():
        first = found.get("anyOf", [found])[0]
        if name in ("dimensions", "output_dimension"):
            found["anyOf"][0] = {"type": "integer", **_sizes(model)}
        elif name in ("texts", "sentences"):
            found["maxItems"] = model.max_inputs
        elif name in ("normalize", "normalized") and model.normalized:
            first["enum"] = [True]
        elif name in prompts:
            found["anyOf"][0] = {"type": "string", "enum": prompts[name]} if prompts[name] else {"type": "null"}
        elif name == "instruction" and not model.takes_instruction:
            found["anyOf"][0] = {"type": "null"}
        elif name == "outputs":
            first["items"]["enum"] = list(model.outputs)
        elif name == "prompt" and "input" in properties and not model.prompts.pooled:
            first["maxLength"] = 0
        elif name in ("input", "inputs") and len(found.get("anyOf", ())) == 4:
            text, texts, ids, rows = found["anyOf"]
            texts["maxItems"] = rows["maxItems"] = model.max_inputs
            ids["items"]["maximum"] = rows["items"]["items"]["maximum"] = model.vocabulary_size - 1
            # Token ids have no prompt.
            no_prompt = {key: {"type": "null"} for key in ("prompt", *prompts) if key in properties}
            schema["anyOf"] = [{"properties": {name: {"anyOf": [text, texts]}}}, {"properties": no_prompt}]


def _sizes(model: ServedModel) -> dict[str, Any]:
    if (sizes := model.matryoshka) is None:
        return {"minimum": 1, "maximum": model.dimensions}
    return {"enum": sorted({*(d for d in sizes if d < model.dimensions), model.dimensions})}


def _get(path: str, name: str) -> dict[str, Any]:
    summary, media = _GET_ROUTES[path]
    schema = {"type": "object"} if media == _JSON else {"type": "string"}
    responses: dict[str, Any] = {"200": {"description": summary, "content": {media: {"schema": schema}}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_") or "root",
        "responses": responses,
    }
    if path in ("/livez", "/readyz", "/health"):
        # Probes use only the status, so the body has no schema.
        operation["responses"] = {"200": {"description": summary}, "503": {"description": "Otherwise."}}
    if path == "/info":
        responses["503"] = _error(_ERRORS["503"])
    if "{name}" in path:
        operation["operationId"] = "v1_model"
        operation["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "example": name}
        ]
        responses["404"] = _error(_ERRORS["404"])
    return operation


def _post(path: str, at: Sequence[tuple[ServedModel, Endpoint]]) -> dict[str, Any]:
    model, endpoint = at[0]
    headers = {key: {"description": text, "schema": {"type": "string"}} for key, text in _HEADERS.items()}
    wait = {"description": "Seconds until a retry is useful.", "schema": {"type": "integer", "minimum": 1}}
    both = [dict.fromkeys(each.bodies[side] for _, each in at) for side in (0, 1)]
    request, response = (
        {"schema": _reference(*kinds) if len(kinds) == 1 else {"anyOf": [_reference(kind) for kind in kinds]}}
        for kinds in both
    )
    error, statuses = endpoint.errors[1], dict(_ERRORS)
    vectors = any(each.name == "embeddings" for _, each in at)
    if not vectors:
        del headers[HEADER], statuses["412"]
    return {
        "summary": endpoint.summary,
        "operationId": f"create_{path.strip('/').replace('/', '_') or 'root'}",
        "parameters": [_PRIORITY, *([_SPACE] if vectors else ())],
        "requestBody": {
            "required": True,
            "content": {_JSON: {**request, "example": {"model": model.name, **endpoint.example}}},
        },
        "responses": {
            "200": {"description": "Success.", "headers": headers, "content": {_JSON: response}},
            **{status: _error(text, error) for status, text in statuses.items()},
            "429": {**_error(_ERRORS["429"], error), "headers": {"retry-after": wait}},
        },
    }


def _error(description: str, body: type[BaseModel] = ErrorResponse) -> dict[str, Any]:
    return {"description": description, "content": {_JSON: {"schema": _reference(body)}}}


def _reference(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def page(name: str, at: _At) -> str:
    """Return a page with the routes, the fields of requests and examples, each for all models that differ in them."""
    spec, parts = document(name, at), []
    for path, found in at.items():
        for kind, (model, endpoint) in {each[1].bodies[0]: each for each in reversed(found)}.items():
            fields = spec["components"]["schemas"][kind.__name__]["properties"]
            described = docs_page.table((field, entry.get("description", "")) for field, entry in fields.items())
            body = orjson.dumps({"model": model.name, **endpoint.example}).decode()
            curl = html.escape(f"curl -s $URL{path} -H 'content-type: application/json' -d '{body}'")
            parts += [f"<h2>POST {path}</h2><pre>{curl}</pre>", described]
    return docs_page.render(spec, *parts, "<h2>Errors</h2>", docs_page.table(_ERRORS.items()))
