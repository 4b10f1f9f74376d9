"""Random requests to a running server: each gets a 200 or a 4xx in OpenAI's envelope, never a 5xx or a hang."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from inferctl.serve.api import app, schemas
from tests.processes import ServerProcess, until

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def server(minilm: Path, serve_module: Callable[..., ServerProcess]) -> Iterator[ServerProcess]:
    running = serve_module("--model", str(minilm), "--engine", "echo", "--name", "echo")
    yield running
    # After all tests, no request is in flight and the server still responds.
    until(lambda: in_flight(running) == 0, 30)
    assert running.embed(input=[5]).status_code == 200
    assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as connected:
        yield connected


def in_flight(server: ServerProcess) -> float:
    return server.metric("inferctl_requests_in_flight")


def connected(server: ServerProcess) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def accepted_or_rejected(answer: httpx.Response) -> int:
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    return answer.status_code


def post(client: httpx.Client, raw: bytes, media: str = "application/json") -> httpx.Response:
    return client.post("/v1/embeddings", content=raw, headers={"content-type": media})


@given(JSON | st.dictionaries(st.text(max_size=8), JSON))
def test_any_json(client: httpx.Client, body: object) -> None:
    assert accepted_or_rejected(post(client, json.dumps(body).encode())) == 400


@given(st.binary(max_size=200), st.sampled_from([b"", b'{"input": "', b'{"input": [5], "user": "', b'{"input": [']))
def test_any_bytes(client: httpx.Client, raw: bytes, before: bytes) -> None:
    accepted_or_rejected(post(client, before + raw))


@given(st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_categories=["Cc"]), max_size=40))
def test_any_content_type_and_request_id(client: httpx.Client, value: str) -> None:
    headers = {"content-type": value.encode("latin-1"), "x-request-id": value.encode("latin-1")}
    accepted_or_rejected(client.post("/v1/embeddings", content=b'{"input": [5]}', headers=headers))


@given(st.binary(max_size=60), st.sampled_from([b"", b"POST /v1/embeddings HTTP/1.1\r\n", b"GET /v1/models/"]))
@settings(max_examples=60)
def test_any_bytes_on_the_wire(server: ServerProcess, raw: bytes, before: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(before + raw + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := connection.recv(1 << 16):
                answer += part
        except ConnectionResetError:
            pass
    assert not answer or answer[9:10] in b"234"


@pytest.mark.parametrize(
    ("sent", "endpoint"),
    [
        (b"garbage\r\n\r\n", "none"),
        (b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "embeddings"),
    ],
    ids=["no request", "in a body"],
)
def test_a_rejection_of_the_connection_is_counted_once(server: ServerProcess, sent: bytes, endpoint: str) -> None:
    def counts() -> Counter[tuple[str, str]]:
        families = text_string_to_metric_families(server.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == "inferctl_requests_total"]
        return Counter({(s.labels["endpoint"], s.labels["status"]): int(s.value) for s in samples})

    before = counts()
    with connected(server) as connection:
        connection.sendall(sent)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400")
    until(lambda: counts() != before, 20)
    assert counts() - before == {(endpoint, "400"): 1}


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/models", "/livez", "/metrics", "/nothing", "/v1/embeddings/x"])
def test_methods_and_paths(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, path)
    known = path not in ("/nothing", "/v1/embeddings/x")
    allowed = known and method in ("GET", "HEAD") and path != "/v1/embeddings"
    assert answer.status_code == (200 if allowed else 405 if known else 404)
    if method != "HEAD" and not allowed:
        accepted_or_rejected(answer)
    if answer.status_code == 405:
        assert method not in answer.headers["allow"].split(", ")


@pytest.mark.parametrize(
    "path",
    ["//v1/embeddings", "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/" + "a" * 5000, "/%0d%0ax: y", "/../x"],
)
def test_odd_paths(client: httpx.Client, path: str) -> None:
    assert accepted_or_rejected(client.get(path)) == 404


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b'{"input": [5], "input": []}', 400, "empty_input"),
        (b'{"input": "a", "user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "invalid_json"),
        (b'{"input": [' + b"1.5," * 500_000 + b"1.5]}", 400, "invalid_type"),
        (b'{"input": [' + b'"a",' * 500_000 + b"1]}", 400, "too_many_inputs"),
        (b'{"input": [' + b"[5]," * 300_000 + b"[5]]}", 400, "too_many_inputs"),
        (b'{"input": [' + b"9" * 100_000 + b"]}", 400, "invalid_json"),
        (b'{"input": "' + b" " * 3_000_000 + b'"}', 400, "text_too_long"),
        (b'{"input": "a", "model": "' + b"m" * 1_000_000 + b'"}', 404, "model_not_found"),
        (b'{"input": "a"}' + b" " * (33 << 20), 413, "body_too_large"),
    ],
    ids=["duplicate key", "deep", "floats", "texts", "lists", "number", "blanks", "model", "large"],
)
def test_bodies_that_are_expensive_to_parse(client: httpx.Client, raw: bytes, status: int, code: str) -> None:
    answer = post(client, raw)
    assert (accepted_or_rejected(answer), answer.json()["error"]["code"]) == (status, code)
    assert len(answer.content) < 4000


def arrays(schema: dict[str, Any], known: dict[str, Any]) -> Iterator[list[str | int]]:
    """Yield the path of each list in a JSON schema: names of fields, and 0 for the item of a list."""
    schema = known[str(schema["$ref"]).rpartition("/")[2]] if "$ref" in schema else schema
    if schema.get("type") == "array":
        yield []
    inner = [([], part) for name in ("anyOf", "allOf", "oneOf") for part in schema.get(name, ())]
    inner += [([name], part) for name, part in schema.get("properties", {}).items()]
    inner += [([0], schema["items"])] if "items" in schema else []
    for before, part in inner:
        for path in arrays(part, known):
            yield [*before, *path]


REQUESTS = dict.fromkeys(endpoint.bodies[0] for endpoint in app.ALL)
SCHEMAS = {model: model.model_json_schema() for model in REQUESTS}
LISTS = [(model, path) for model, schema in SCHEMAS.items() for path in arrays(schema, schema.get("$defs", {}))]


@pytest.mark.parametrize(("model", "path"), LISTS, ids=[f"{model.__name__} {path}" for model, path in LISTS])
@pytest.mark.parametrize("item", [0, 0.5, "x", "", None, [], {}, [0], [[0]], {"text": 0}], ids=str)
def test_no_list_of_a_request_keeps_an_error_for_each_item(
    model: type[schemas.ModelRequest], path: list[str | int], item: Any
) -> None:
    """pydantic keeps one error of about 1 kB for each invalid item of a list without `max_length` or `fail_fast`."""
    example = next(endpoint.example for endpoint in app.ALL if endpoint.bodies[0] is model)
    value: Any = [item] * 5_000
    for name in reversed(path):
        value = [value] if name == 0 else {name: value}
    try:
        model.model_validate(example | value, context={"max_inputs": 2048})
    except ValidationError as error:
        assert error.error_count() <= 16
