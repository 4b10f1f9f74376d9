"""Keys and limits of generation, around the stand-in for vLLM."""

from __future__ import annotations

import concurrent.futures
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from inferctl.tenancy.access.key_file import ApiKey
from tests.processes import until
from tests.serve.test_generation import Generation, Start, failing, launch, llama, start  # noqa: F401  # fixtures
from tests.tenancy.key_files import add


@pytest.fixture(scope="module")
def server(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generation]:  # noqa: F811
    """A server with a key file, in which each test has keys of its own."""
    folder = tmp_path_factory.mktemp("keys")
    _, secret = add(folder / "keys.json", "first", budget="1 EUR/month")
    price = '{hardware: "*", currency: EUR, from: 2026-01-01, input: 1000, output: 1000}'
    (folder / "prices.yaml").write_text(f"prices: [{price}]")
    metering = {"INFERCTL_METERING_MODE": "on", "INFERCTL_METERING_PRICES": "prices.yaml"}
    running = launch(folder, llama, "--keys", "keys.json", **metering).wait_announced()
    until(lambda: chat(running, secret, "1").status_code == 200, 60)  # the relay says what the ledger has
    yield running
    running.kill()


def add_key(server: Generation, **fields: object) -> tuple[ApiKey, str]:
    """Add a key, and return it when the server accepts it."""
    key, secret = add(server.log.parent / "keys.json", **fields)  # type: ignore[arg-type]
    until(lambda: server.get("/v1/models", secret).status_code == 200)
    return key, secret


def events(server: Generation, key: ApiKey) -> list[dict[str, Any]]:
    return [event for event in server.events() if event["key_id"] == key.id]


def chat(server: Generation, key: str, script: str, **options: object) -> httpx.Response:
    return server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": script}], **options}, key)


def test_keys_and_limits(server: Generation) -> None:
    key, secret = add_key(server, tokens_per_minute=200)
    _, other = add_key(server)
    _, admin = add_key(server, admin=True, endpoints=["embeddings"])
    assert failing(lambda: server.chat("3")) == "401 invalid_api_key"
    assert chat(server, admin, "3").json()["error"]["code"] == "forbidden"
    for path in ("/", "/metrics", "/info", "/docs", "/openapi.json", "/redoc"):
        assert server.get(path).status_code == 401, path
        page = server.get(path, admin)
        assert page.status_code == 200, path
        if path in ("/docs", "/redoc"):
            # vLLM's pages load scripts from other hosts, and its document has endpoints that are not passed on.
            assert not [
                text for text in ("<script", "src=", "://", "/v1/completions/render", "<it>") if text in page.text
            ]
            assert "POST /v1/chat/completions" in page.text
    assert [server.get(path).status_code for path in ("/readyz", "/health")] == [200, 200]
    # The estimate of the prompt and `max_tokens` are reserved, and what was used is charged.
    answer = chat(server, secret, "5", max_tokens=100)
    assert answer.status_code == 200
    assert answer.json()["usage"]["total_tokens"] == 12
    second = chat(server, secret, "5", max_tokens=100)
    assert second.status_code == 200
    large = chat(server, secret, "5", max_tokens=150, n=2)
    assert (large.status_code, large.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert large.headers["x-ratelimit-remaining-tokens"] == str(200 - 24)
    assert large.headers["x-should-retry"] == "false"
    assert chat(server, secret, "invalid", max_tokens=10).status_code == 400
    # A client that leaves pays for what it got.
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret, max_retries=0)
    messages = [{"role": "user", "content": "100"}]
    stream = client.chat.completions.create(model="m", messages=messages, stream=True, max_tokens=100)  # type: ignore
    for _ in range(3):
        next(stream)
    running = chat(server, secret, "3", max_tokens=80)
    assert running.status_code == 429  # the stream holds its reservation
    stream.close()
    until(lambda: len([event for event in events(server, key) if event["status"] == 499]) == 1)
    until(lambda: len([event for event in events(server, key) if event["status"] == 200]) == 2)
    assert chat(server, other, "3").status_code == 200
    log = server.log.read_text()
    assert not any(each in log for each in (secret, other, admin))


# What the official clients of each API see of a key and a request, and how often they try.
ERRORS: list[tuple[dict[str, Any], dict[str, Any], int, str, int]] = [
    ({}, {"model": "unknown"}, 404, "model_not_found", 1),
    ({"revoked": True}, {}, 401, "invalid_api_key", 1),
    ({"endpoints": ["embeddings"]}, {}, 403, "forbidden", 1),
    ({}, {"background": True, "container": "c"}, 400, "stateless", 1),
    ({}, {"padding": "a" * 4_200_000}, 413, "body_too_large", 1),
    ({"tokens_per_minute": 10}, {}, 429, "rate_limit_exceeded", 1),  # it never fits
    ({"budget": "0.00001 EUR/month"}, {}, 429, "budget_exceeded", 1),
    ({"budget": "0.00001 USD/month"}, {}, 503, "budget_unavailable", 1),
    ({}, {"script": "busy"}, 429, "queue_full", 2),
]


@pytest.mark.parametrize(("fields", "more", "status", "code", "tries"), ERRORS)
@pytest.mark.parametrize("api", ["responses", "messages"])
def test_official_clients_try_again_what_can_succeed(
    server: Generation, api: str, fields: dict[str, Any], more: dict[str, Any], status: int, code: str, tries: int
) -> None:
    _, secret = add_key(server, **{name: value for name, value in fields.items() if name != "revoked"})
    messages = [{"role": "user", "content": more.get("script", "3")}]
    options: dict[str, Any] = {"api_key": "none" if "revoked" in fields else secret, "max_retries": 1}
    body: dict[str, Any] = {"model": "m", "extra_body": more}
    client: Any = openai.OpenAI(base_url=f"{server.url}/v1", **options).responses
    body |= {"input": messages, "max_output_tokens": 20}
    if api == "messages":
        client = anthropic.Anthropic(base_url=server.url, **options).messages
        body = {"model": "m", "extra_body": more, "messages": messages, "max_tokens": 20}
    earlier = len(server.requests(api))
    with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)) as raised:
        client.create(**body)
    document: Any = raised.value.response.json()
    assert (raised.value.status_code, document["error"]["code"]) == (status, code)
    assert document.get("type") == ("error" if api == "messages" else None)
    until(lambda: len(server.requests(api)) == earlier + tries)


def budget_of(response: httpx.Response) -> dict[str, str]:
    return dict(part.split("=") for part in response.headers["x-inferctl-budget"].split(", "))


def test_each_request_costs_what_its_event_says(server: Generation) -> None:
    """Several choices, all APIs, requests that fail, and tokens that are only counted."""
    key, secret = add_key(server, budget="2 EUR/month")
    asked = {"messages": [{"role": "user", "content": "5"}], "max_tokens": 20}
    calls: list[tuple[str, dict[str, Any], int]] = [
        ("/v1/chat/completions", {**asked, "n": 3}, 200),
        ("/v1/responses", {"input": asked["messages"]}, 200),
        ("/v1/messages", asked, 200),
        ("/tokenize", {"prompt": "a" * 50}, 200),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "invalid"}]}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "busy"}]}, 429),
        ("/v1/chat/completions", {**asked, "max_tokens": 100, "n": 64}, 429),  # it could cost too much
    ]
    for path, body, status in calls:
        found = server.post(path, {"model": "m", **body}, secret)
        assert found.status_code == status, (path, found.text)
    assert found.json()["error"]["code"] == "budget_exceeded"
    until(lambda: events(server, key)[-1:] and events(server, key)[-1]["code"] == "budget_exceeded", 20)
    logged = [each for api in ("chat", "responses", "messages") for each in server.requests(api)]
    used = sum(each["tokens"] + each["output_tokens"] for each in logged if each["key_id"] == key.id)
    assert (float(budget_of(found)["spent"]), budget_of(found)["reserved"]) == (used / 1000, "0")


def test_one_key_does_not_take_all_sequences(start: Start, tmp_path: Path) -> None:  # noqa: F811
    keys = tmp_path / "keys.json"
    (_, first), (_, second) = add(keys), add(keys, "b")
    server = start("--keys", str(keys), "--max-sequences", "10")
    never = chat(server, first, "3", n=9)
    assert (never.status_code, never.json()["error"]["code"]) == (400, "too_many_sequences")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=first, max_retries=0, timeout=60)
    long = {"model": "m", "messages": [{"role": "user", "content": "100000"}], "n": 8}
    with client.chat.completions.create(stream=True, **long) as running:  # type: ignore[call-overload]
        next(iter(running))  # runs until it is closed, however busy the machine is
        for key, more in ((first, 1), (first, 4), (second, 6)):
            rejected = chat(server, key, "3", n=more)
            assert (rejected.status_code, rejected.json()["error"]["code"]) == (429, "key_share"), more
        assert chat(server, second, "3").status_code == 200
    until(lambda: chat(server, first, "3", n=8).status_code == 200)


@pytest.mark.parametrize(
    ("script", "body", "prompt", "answer"),
    [
        ("1000", {}, 7, range(1, 40)),
        ("1000", {"stream": True}, 7, range(1, 40)),
        # vLLM caches a prompt in parts, and a moment later the same one would pay the price of cached tokens.
        ("prefill", {"stream": True}, 7, [0]),
        ("tokenize", {}, 0, [0]),  # the engine does not have it yet
    ],
)
def test_a_client_that_leaves_pays_for_what_the_engine_computed(
    server: Generation, script: str, body: dict[str, object], prompt: int, answer: Sequence[int]
) -> None:
    key, secret = add_key(server, tokens_per_minute=5000, budget="100 EUR/month")
    _, admin = add_key(server, admin=True)
    body = {"messages": [{"role": "user", "content": script}], "max_tokens": 1000, "n": 4, **body}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, headers={"x-api-key": secret}, timeout=0.5
        ) as response,
    ):
        time.sleep(0.5)
        response.close()
        raise httpx.ReadTimeout("left in mid-stream")
    until(lambda: len(events(server, key)) == 1, 10)
    (left,) = events(server, key)
    assert (left["status"], left["code"], left["tokens"]) == (499, "client_disconnected", prompt)
    assert left["output_tokens"] in answer
    last = chat(server, secret, "1", max_tokens=1)
    spent = f"{(prompt + left['output_tokens']) / 1000:.9f}"
    assert float(budget_of(last)["spent"]) == float(spent), "before `last`"
    charged = 5000 - int(last.headers["x-ratelimit-remaining-tokens"])
    assert prompt + left["output_tokens"] < charged <= prompt + left["output_tokens"] + 70, "and what was tokenized"

    def generated() -> list[str]:
        return re.findall(r"^vllm:generation_tokens_total.*", server.get("/metrics", admin).text, re.M)

    before = generated()
    time.sleep(0.3)
    assert generated() == before != [], "the request that vLLM ended generates no more"


def test_the_tokenizer_counts_towards_the_limit_and_is_shared(server: Generation) -> None:
    (_, limited), (_, first), (_, second) = add_key(server, tokens_per_minute=1000), add_key(server), add_key(server)

    def tokenize(secret: str, text: str) -> httpx.Response:
        return server.post("/tokenize", {"prompt": text}, secret)

    assert tokenize(limited, "a" * 8000).json()["error"]["code"] == "rate_limit_exceeded"
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        many = [pool.submit(tokenize, first, "a" * 50_000) for _ in range(12)]
        until(lambda: sum(each.done() for each in many) >= 8)
        assert tokenize(second, "a").status_code == 200
        codes = sorted(each.result().status_code for each in many)
    assert codes == [200] * 4 + [429] * 8
    answer = tokenize(limited, "a" * 100)
    assert answer.status_code == 200
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) <= 975  # an estimate
    assert 990 <= int(tokenize(limited, "a").headers["x-ratelimit-remaining-tokens"]) < 999  # it had one token


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [], "max_tokens": "4000"},  # rejected by the edge
        {"messages": [{"role": "user", "content": "invalid"}], "max_tokens": 1},  # by vLLM
        {"messages": [{"role": "user", "content": "2"}], "model": "unknown", "max_tokens": 1},
    ],
)
def test_rejected_bodies_count_as_work_in_vain(server: Generation, fields: dict[str, object]) -> None:
    _, secret = add_key(server, tokens_per_minute=2000)
    body = fields | {"x": "a" * 3000}
    seen = [server.post("/v1/chat/completions", body, secret).status_code for _ in range(6)]
    assert set(seen[:2]) <= {400, 404}
    assert seen[-1] == 429
    assert chat(server, secret, "2", max_tokens=2).status_code == 200  # a small one surely fits


def test_what_vllm_quotes_of_requests_is_not_logged(start: Start) -> None:  # noqa: F811
    server = start()
    requests: list[dict[str, object]] = [
        {"model": "unknown-geheim"},
        {"structured_outputs": {"grammar": "geheim"}},
        {"stop": ["geheim"], "messages": [{"role": "user", "content": "engine dies"}], "stream": True},
    ]
    found = [chat(server, "", "5", **{"model": "m", **more}).status_code for more in requests]
    assert found == [404, 400, 200]
    assert "geheim" not in server.get("/v1/geheim").text  # a key in a path
    until(lambda: server.log.read_text().count("an error line") == 2)  # vLLM was started again
    assert "geheim" not in server.log.read_text()
