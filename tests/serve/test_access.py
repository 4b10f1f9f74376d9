"""Keys and limits on a real server: who is let in, what is closed, what is counted, and what leaves no trace."""

from __future__ import annotations

import json
import socket
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from inferctl import cli
from inferctl.bench.load import http_json, target
from inferctl.config import settings
from inferctl.config.spec import Access
from inferctl.core.errors import NotReadyError
from inferctl.serve.edge import access
from inferctl.tenancy.access import key_file
from inferctl.tenancy.access.key_file import ApiKey
from tests.processes import CLIENT, ServerProcess, start, until, write_spec
from tests.tenancy.key_files import add


@dataclass
class Guarded:
    """A server with a key file."""

    server: ServerProcess
    keys: Path

    def key(self, name: str = "a", **fields: object) -> tuple[ApiKey, str]:
        """Create a key, and return it when the server accepts it."""
        key, secret = add(self.keys, name, **fields)
        if not key.expires:
            until(lambda: self.get("/v1/models", secret).status_code == 200)
        return key, secret

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        return self.server.get(path, key)

    def embed(self, key: str | None = None, text: Any = "hello", **headers: Any) -> httpx.Response:
        return self.server.post("/v1/embeddings", {"input": text}, key, **headers)

    def embed_with(self, *headers: tuple[str, str]) -> httpx.Response:
        return CLIENT.post(f"{self.server.url}/v1/embeddings", json={"input": "hello"}, headers=list(headers))

    def client(self, key: str, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=key, **options)


@pytest.fixture(scope="module")
def guarded(
    minilm: Path, tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]
) -> Guarded:
    keys = tmp_path_factory.mktemp("guarded") / "keys.json"
    add(keys, "first")
    arguments = ("--model", str(minilm), "--engine", "echo", "--name", "echo", "--log", "json", "--keys", str(keys))
    return Guarded(serve_module(*arguments), keys)


def test_a_key_is_accepted_in_each_header(guarded: Guarded) -> None:
    _, key = guarded.key()
    assert guarded.embed(key).status_code == 200
    assert guarded.embed(x_api_key=key).status_code == 200
    assert guarded.embed(api_key=key).status_code == 200
    assert guarded.embed(authorization=f"bearer {key}").status_code == 200
    assert guarded.embed(authorization="Basic abc", x_api_key=key).status_code == 200
    assert guarded.client(key).embeddings.create(model="echo", input="hello").data
    # Without limits, no headers of limits.
    assert not [name for name in guarded.embed(key).headers if "ratelimit" in name]


def test_a_header_that_appears_twice_opens_nothing(guarded: Guarded) -> None:
    _, key = guarded.key()
    good, bad = f"Bearer {key}", "Bearer other"
    for first, second in ((good, good), (good, bad), (bad, good), ("Basic abc", good)):
        assert guarded.embed_with(("authorization", first), ("Authorization", second)).status_code == 401
    for name in ("x-api-key", "api-key"):
        assert guarded.embed_with((name, key), (name, "other")).status_code == 401
    # Different headers have an order.
    for name in ("x-api-key", "api-key"):
        assert guarded.embed_with((name, "other"), ("authorization", good)).status_code == 200
        assert guarded.embed_with((name, key), ("authorization", bad)).status_code == 401
    assert guarded.embed_with(("api-key", "other"), ("x-api-key", key)).status_code == 200


def test_each_bad_key_gets_the_same_401(guarded: Guarded) -> None:
    key, secret = guarded.key()
    _, expired = guarded.key(expires=datetime.now(UTC) - timedelta(seconds=1))
    with key_file.edit(guarded.keys) as found:
        found[key.id] = key.model_copy(update={"revoked": key_file.now()})
    until(lambda: guarded.embed(secret).status_code == 401)
    bad = [None, "x", "ik_live_", secret, expired, secret[:-1], "a" * 5000]
    answers = [guarded.embed(each) for each in bad]
    answers.append(guarded.embed(x_inferctl_key_id="a"))  # a client cannot name itself
    answers.append(guarded.embed(authorization=b"Bearer \xff"))
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json()["error"]["code"] == "invalid_api_key"
    assert answers[0].headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        guarded.client("none").embeddings.create(model="echo", input="hello")


def test_probes_are_open_and_pages_need_an_admin(guarded: Guarded) -> None:
    _, user = guarded.key()
    _, admin = guarded.key(admin=True)
    for path in ("/livez", "/readyz", "/health"):
        assert guarded.get(path).status_code == 200
    for path in ("/", "/metrics", "/info", "/docs", "/openapi.json"):
        assert [guarded.get(path, key).status_code for key in (None, user, admin)] == [401, 403, 200], path
    assert guarded.get("/info", user).json()["error"]["code"] == "forbidden"
    assert [guarded.get("/v1/models", key).status_code for key in (None, user)] == [401, 200]
    assert guarded.get("/unknown").status_code == 401


def test_scopes(guarded: Guarded) -> None:
    allowed = [{"endpoints": ["embeddings"]}, {"models": ["echo"]}, {"models": ["other", "echo"]}]
    for fields in allowed:
        _, key = guarded.key(**fields)
        assert guarded.embed(key).status_code == 200, fields
    _, key = guarded.key(endpoints=["rerank"])
    assert guarded.embed(key).json()["error"]["code"] == "forbidden"
    _, key = add(guarded.keys, models=["other"])
    until(lambda: guarded.embed(key).status_code == 403)


def test_a_path_that_is_a_page_and_an_endpoint_needs_a_key_for_the_endpoint(
    guarded: Guarded, serve: Callable[..., ServerProcess], minilm: Path, tmp_path: Path
) -> None:
    _, key = guarded.key("plain")
    _, scoped = guarded.key("scoped", endpoints=["rerank"])
    spec = write_spec(tmp_path, minilm, access={"keys": str(guarded.keys), "open": ["docs"]})
    for server in (guarded.server, serve("--spec", spec, "--engine", "echo")):
        sent = (f"Bearer {key}", key, f"Bearer {scoped}", "Bearer ik_no")  # without `Bearer` as clients of TEI do
        found = [server.post("", {"inputs": "a"}, authorization=each).status_code for each in sent]
        assert [*found, server.post("", {"inputs": "a"}).status_code] == [200, 200, 403, 401, 401]


def test_the_log_has_the_id_of_the_key_and_never_the_key(guarded: Guarded) -> None:
    key, secret = guarded.key(priority="bulk")
    assert guarded.embed(secret).status_code == 200
    assert guarded.embed("a-wrong-key").status_code == 401
    guarded.client(secret).embeddings.create(model="echo", input="hello")

    def requests() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in guarded.server.log.read_text().splitlines()]
        return [line for line in lines if line.get("endpoint") == "embeddings"]

    until(lambda: sum(line["key_id"] == key.id for line in requests()) == 2)
    assert all(line["bulk"] for line in requests() if line["key_id"] == key.id)
    text = guarded.server.log.read_text()
    assert secret not in text
    assert secret.rsplit("_", 1)[-1] not in text
    assert "a-wrong-key" not in text


def test_limits_have_headers_and_a_429(guarded: Guarded) -> None:
    _, key = guarded.key(requests_per_minute=2, tokens_per_minute=100)
    first = guarded.embed(key)
    assert first.headers["x-ratelimit-remaining-tokens"] == str(100 - int(first.headers["x-inferctl-tokens"]))
    assert first.headers["ratelimit-policy"] == '"requests";q=2;w=60, "tokens";q=100;w=60'
    seconds = int(first.headers["ratelimit"].rpartition("=")[2])
    assert first.headers["ratelimit"].startswith('"requests";r=1;t=')
    assert first.headers["x-ratelimit-reset-tokens"] == (f"1m{seconds - 60}s" if seconds > 59 else f"{seconds}s")
    large = guarded.embed(key, "word " * 98)
    assert (large.status_code, large.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "tokens" in large.json()["error"]["message"]
    # A request that was rejected costs nothing.
    assert guarded.embed(key).status_code == 200
    third = guarded.embed(key)
    assert third.status_code == 429
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert 0 < int(third.headers["retry-after-ms"]) <= 1000 * int(third.headers["retry-after"]) <= 65_000
    never = guarded.embed(guarded.key(tokens_per_minute=5)[1], "word " * 20)
    assert (never.status_code, never.headers["x-should-retry"]) == (429, "false")
    assert "retry-after" not in never.headers
    assert guarded.embed(guarded.key()[1]).status_code == 200  # nobody else waits


def test_the_openai_client_waits_as_long_as_the_server_says(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key = guarded.key(requests_per_minute=1)
    waited: list[float] = []
    clock = types.SimpleNamespace(sleep=waited.append, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr("openai._base_client.time", clock)
    client = guarded.client(key, max_retries=2)
    client.embeddings.create(model="echo", input="hello")
    with pytest.raises(openai.RateLimitError) as error:
        client.embeddings.create(model="echo", input="hello")
    assert error.value.code == "rate_limit_exceeded"
    assert len(waited) == 2
    last = int(error.value.response.headers["retry-after-ms"]) / 1000
    assert waited[1] == pytest.approx(last, abs=1)
    _, small = guarded.key(tokens_per_minute=1)
    with pytest.raises(openai.RateLimitError):
        guarded.client(small, max_retries=2).embeddings.create(model="echo", input="hello world")
    assert len(waited) == 2  # a retry would not help


@pytest.mark.parametrize(
    "text", ["word " * 200_000, ["word " * 100] * 500 + [" " * 300_000]], ids=["too many tokens", "an error at the end"]
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_small_limit_of_tokens_bounds_what_is_tokenized(guarded: Guarded, text: Any, chunked: bool) -> None:
    _, key = guarded.key(tokens_per_minute=5000)
    body = json.dumps({"input": text, "truncate": True}).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def send() -> httpx.Response:
        content = iter([body]) if chunked else body
        return CLIENT.post(f"{guarded.server.url}/v1/embeddings", content=content, headers=headers)

    assert send().status_code in (200, 400)  # tokenized
    for _ in range(3):
        response = send()
        assert response.status_code == 429
        assert "the request needs about" in response.json()["error"]["message"]
        assert 0 < int(response.headers["retry-after"]) <= 65
    assert guarded.server.post("/v1/embeddings", b'"x"', key).status_code == 400, "a small request is read"


@pytest.mark.parametrize(
    "body",
    [
        {"input": [[10**9]]},
        {"input": [[1], [-1]]},
        {"input": "a", "model": "another"},
        {"input": "a", "encoding_format": "x"},
        {"input": ["a", 1]},
        [],
    ],
)
def test_bodies_that_are_rejected_when_they_are_parsed_count_as_work_in_vain(guarded: Guarded, body: Any) -> None:
    _, key = guarded.key(tokens_per_minute=1000)
    # An unknown field is ignored, but parsed.
    content = {**body, "padding": "a" * 4000} if isinstance(body, dict) else ["a" * 4000]
    seen = [guarded.server.post("/v1/embeddings", content, key).status_code for _ in range(3)]
    assert seen[0] in (400, 404)
    assert seen[-1] == 429
    assert guarded.embed(key, "a").status_code == 200, "a small request surely fits"


def test_limits_of_the_spec_and_open_pages(serve: Callable[..., ServerProcess], minilm: Path, tmp_path: Path) -> None:
    _, key = add(tmp_path / "keys.json")
    limits = {"open": ["metrics", "docs"], "requests_per_minute": 4, "replicas": 2}
    write_spec(tmp_path, minilm, access={"keys": "keys.json", **limits})
    guarded = Guarded(serve("--engine", "echo"), tmp_path / "keys.json")
    assert [guarded.embed(key).status_code for _ in range(3)] == [200, 200, 429]
    codes = [guarded.get(path).status_code for path in ("/metrics", "/docs", "/openapi.json", "/info", "/v1/models")]
    assert codes == [200, 200, 200, 401, 401]
    assert guarded.server.metric("inferctl_rejected_total", reason="rate_limit_exceeded") == 1
    assert "asks for no key" not in guarded.server.log.read_text()


@pytest.mark.parametrize(
    ("settings", "host", "expected"),
    [
        ({}, "127.0.0.1", []),
        ({}, "::1", []),
        ({}, "localhost", []),
        ({}, "0.0.0.0", ["asks for no key"]),
        ({}, "10.1.2.3", ["asks for no key"]),
        ({"keys": "k"}, "0.0.0.0", []),
        ({"tokens_per_minute": 5}, "127.0.0.1", ["no effect"]),
        ({"keys": "k", "broker": "nats://b"}, "127.0.0.1", ["access.replicas is 1"]),
        ({"keys": "k", "broker": "nats://b", "replicas": 2}, "127.0.0.1", []),
    ],
)
def test_what_the_operator_should_know_is_a_warning(settings: Any, host: str, expected: list[str]) -> None:
    found = list(access.warnings(Access(**settings), host))
    assert [text in line for text, line in zip(expected, found, strict=True)] == [True] * len(expected)


def test_a_server_without_its_key_file_does_not_start(minilm: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(minilm), "--engine", "echo", "--keys", "missing.json")
    with pytest.raises(AssertionError, match=r"key file missing\.json cannot be read"):
        start(tmp_path, *arguments)


def test_a_gateway_names_the_caller(serve: Callable[..., ServerProcess], minilm: Path, tmp_path: Path) -> None:
    _, key = add(tmp_path / "keys.json")
    limits = {"trusted_proxies": ["127.0.0.0/8"], "requests_per_minute": 2}
    write_spec(tmp_path, minilm, access={"keys": "keys.json", **limits})
    guarded = Guarded(serve("--engine", "echo", "--log", "json"), tmp_path / "keys.json")
    assert guarded.embed().status_code == 401
    codes = [guarded.embed(x_inferctl_key_id=name).status_code for name in ("a", "a", "a", "b")]
    assert codes == [200, 200, 429, 200]
    assert '"key_id":"a"' in guarded.server.log.read_text()
    # C1 control characters, an escape in UTF-8, no UTF-8: a terminal would obey what `inferctl usage` prints.
    for name in (b"\x9b31m", "\x9b31m".encode(), b"\xff", b""):
        assert guarded.embed(x_inferctl_key_id=name).status_code == 401
    assert guarded.embed(x_inferctl_key_id="Größe".encode()).status_code == 200
    # Of two, the gateway may have set only one. Other spellings are other headers.
    for first, second in (("c", "victim"), ("victim", "victim"), ("", "victim")):
        twice = ("x-inferctl-key-id", first), ("X-Inferctl-Key-Id", second)
        assert guarded.embed_with(*twice).status_code == 401
        assert guarded.embed_with(*twice, ("authorization", f"Bearer {key}")).status_code == 401
    assert guarded.embed(key).status_code == 200
    assert guarded.embed_with(("x_inferctl_key_id", "victim")).status_code == 401
    # A gateway may pass on the trailers of its clients.
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(guarded.server.url.rpartition(":")[2])), timeout=10) as client:
        client.sendall(head + b"e\r\n" + b'{"input": "x"}' + b"\r\n0\r\nx-inferctl-key-id: victim\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_the_benchmark_needs_the_key_of_an_admin(guarded: Guarded) -> None:
    _, user = guarded.key()
    with pytest.raises(NotReadyError, match="403") as error:
        target.connect(guarded.server.url, access=http_json.ServerAccess({"Authorization": f"Bearer {user}"}, None))
    assert "--admin" in str(error.value.hint)


def test_a_limit_that_stops_a_benchmark_is_its_error(
    guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Clients wait after a 429, so few responses are one. The error was that responses are missing."""
    _, key = guarded.key(admin=True, requests_per_minute=20)
    monkeypatch.setenv("LIMITED", key)
    options = ["--url", f"a={guarded.server.url}", "--api-key-env", "LIMITED", "--output", str(tmp_path / "out")]
    plan = Path(__file__).parent.parent / "bench" / "short.yaml"
    assert cli.run(["bench", "--plan", str(plan), *options]) == 1
    error = capfd.readouterr().err
    assert "limit of this key is 20 requests per minute" in error and "--requests-per-minute" in error


def test_a_private_server_asks_for_no_key(serve: Callable[..., ServerProcess], minilm: Path, tmp_path: Path) -> None:
    """As `inferctl bench` and the verification of an image start it."""
    write_spec(tmp_path, minilm, access={"keys": "none.json", "trusted_proxies": ["127.0.0.0/8"]})
    server = serve("--engine", "echo", **settings.OPEN_ACCESS)
    assert server.embed(input="hello").status_code == 200
    assert server.get("/info").status_code == 200
