"""The cache of vectors on real servers: what is computed once, who sees what, and that no vector is ever wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inferctl.config.spec import Cache
from inferctl.serve.cache import vector_cache
from inferctl.serve.cache.keys import KeySpace
from inferctl.serve.engines.echo import CRASHING_TOKEN, FAILING_TOKEN, NON_FINITE_TOKEN, SLOW_SECONDS, SLOW_TOKEN
from inferctl.serve.observe.metrics import Metrics
from tests.processes import ServerProcess, python, write_spec
from tests.tenancy.key_files import add

ROOT = Path(__file__).resolve().parents[2]
CACHED = "x-inferctl-cached-tokens"


@pytest.fixture(scope="module")
def cached(minilm: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """A server with a cache and the echo engine."""
    return serve_module("--model", str(minilm), "--engine", "echo", INFERCTL_CACHE_SIZE="16MiB")


def computed(server: ServerProcess) -> float:
    return server.metric("inferctl_batch_sequences_sum")


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    return [entry["embedding"] for entry in response.json()["data"]]


def test_an_input_is_computed_once_and_counted_always(cached: ServerProcess) -> None:
    before, misses = computed(cached), cached.metric("inferctl_cache_misses_total")
    first = cached.embed(input=["a counted text", "another one", "a counted text"])
    second = cached.embed(input=["another one", "a counted text", "a new text"])
    assert computed(cached) - before == 3
    assert cached.metric("inferctl_cache_misses_total") - misses == 3
    assert vectors(first)[0] == vectors(first)[2] == vectors(second)[1]
    assert vectors(first)[1] == vectors(second)[0]
    one = cached.embed(input="a counted text")
    tokens = one.json()["usage"]["prompt_tokens"]
    assert one.headers[CACHED] == str(tokens) == one.headers["x-inferctl-tokens"]
    assert first.headers[CACHED] == str(tokens)  # of the duplicate
    assert first.json()["usage"]["prompt_tokens"] > 2 * tokens
    assert cached.metric("inferctl_cache_bytes") > 0
    assert cached.metric("inferctl_cache_hits_total") >= 3


def test_texts_and_their_token_ids_share_an_entry(cached: ServerProcess) -> None:
    before = computed(cached)
    assert vectors(cached.embed(input="ok")) == vectors(cached.embed(input=[101, 7929, 102]))
    assert computed(cached) - before == 1


def test_a_client_can_skip_the_cache(cached: ServerProcess) -> None:
    def embed(**headers: str) -> httpx.Response:
        return cached.post("/v1/embeddings", {"input": "skipped"}, **headers)

    before = computed(cached)
    first = embed(cache_control="no-store")
    assert embed(cache_control="max-age=0, No-Cache").headers.get(CACHED) is None
    assert computed(cached) - before == 2
    assert vectors(embed()) == vectors(first)
    assert computed(cached) - before == 2


def test_the_ledger_has_what_the_engines_computed(tmp_path: Path) -> None:
    """Clients that leave, half-close and send equal requests, and inputs that fail or crash the engine."""
    script, file = ROOT / "benchmarks" / "peers" / "charges.py", tmp_path / "figures.json"
    python(script, "--requests", "500", "--engine", "echo", "--json", file, timeout=600, code=0)
    figures = json.loads(file.read_text())
    assert figures["charged_tokens"] == figures["computed_tokens"] > 0
    assert figures["requests_in_ledger"] == 500
    assert min(figures["charged_tokens_of_leavers"], figures["cached_tokens"]) > 0


def background(call: Callable[[], httpx.Response]) -> Callable[[], httpx.Response]:
    """Run a request on a thread, and return a function that waits for its response."""
    found: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()

    def response() -> httpx.Response:
        thread.join()
        return found[0]

    return response


def test_an_interactive_request_does_not_wait_for_a_bulk_one(cached: ServerProcess) -> None:
    items = [[SLOW_TOKEN, 60 + n] for n in range(4)] + [[77, 77]]
    bulk = background(lambda: cached.post("/v1/embeddings", {"input": items}, x_priority="bulk"))
    time.sleep(SLOW_SECONDS / 5)
    assert CACHED not in cached.embed(input=[77, 77]).headers
    assert len(vectors(bulk())) == 5


@pytest.mark.parametrize(
    ("token", "code"), [(FAILING_TOKEN, "engine_failed"), (NON_FINITE_TOKEN, "non_finite")], ids=str
)
def test_a_failure_is_not_stored_and_stays_with_its_input(cached: ServerProcess, token: int, code: str) -> None:
    bad, slow = [token, 99], [SLOW_TOKEN, 200 + token]
    both = background(lambda: cached.embed(input=[slow, bad]))
    time.sleep(SLOW_SECONDS / 5)
    good = background(lambda: cached.embed(input=slow))
    assert (both().status_code, both().json()["error"]["code"]) == (500, code)
    assert good().status_code == 200
    before = cached.metric("inferctl_non_finite_total") + cached.metric("inferctl_batch_failures_total")
    assert cached.embed(input=bad).json()["error"]["code"] == code
    after = cached.metric("inferctl_non_finite_total") + cached.metric("inferctl_batch_failures_total")
    assert after > before


def test_a_crash_costs_the_waiting_requests_no_more_than_one_engine(cached: ServerProcess) -> None:
    deaths = cached.metric("inferctl_engine_deaths_total")
    requests = [background(lambda: cached.embed(input=[CRASHING_TOKEN, 5])) for _ in range(8)]
    assert {response().status_code for response in requests} == {503}
    cached.wait_ready()
    assert cached.metric("inferctl_engine_deaths_total") - deaths <= 4
    assert cached.embed(input="still works").status_code == 200


def test_a_tenant_does_not_see_the_entries_of_others(
    minilm: Path, tmp_path: Path, serve: Callable[..., ServerProcess]
) -> None:
    _, first = add(tmp_path / "keys.json", "first")
    _, second = add(tmp_path / "keys.json", "second")
    access = {"keys": "keys.json", "open": ["metrics"]}
    server = serve("--spec", write_spec(tmp_path, minilm, access=access, cache={"size": "16MiB"}), "--engine", "echo")

    def embed(key: str, text: object = "what one tenant sent") -> httpx.Response:
        return server.post("/v1/embeddings", {"input": text}, key)

    assert CACHED not in embed(first).headers
    assert CACHED in embed(first).headers
    assert CACHED not in embed(second).headers
    before = computed(server)
    slow = background(lambda: embed(first, [SLOW_TOKEN, 5]))
    time.sleep(SLOW_SECONDS / 5)
    assert CACHED not in embed(second, [SLOW_TOKEN, 5]).headers
    assert slow().status_code == 200
    assert computed(server) - before == 2


def test_the_memory_is_bounded() -> None:
    cache = vector_cache.create(Cache(size="128KiB"), "embed", Metrics(), share=2)
    assert cache
    for number in range(4_000):
        cache._store.put(b"%d" % number, bytes(32))
        assert number % 100 or cache._store.bytes <= 1.1 * 64 * 1024
    assert cache._store.bytes > 32 * 1024


IDS = st.lists(st.integers(0, 3), min_size=1, max_size=4)
MARKS = st.sampled_from([None, 1, 4])


@given(st.lists(st.tuples(st.sampled_from([None, "", "a", "b"]), st.sampled_from([0, 1]), IDS, MARKS), max_size=50))
# A client sent the bytes of a mark as token ids, and so chose the vectors that others got for a text.
@example([(None, 0, [7, 8], 4), (None, 0, [7, 8, 4, 0], None), (None, 0, [7, 8, 4], None)])
def test_keys_are_equal_only_for_equal_scope_cache_ids_and_marks(
    cases: list[tuple[str | None, int, list[int], int | None]],
) -> None:
    spaces = [KeySpace(), KeySpace()]
    found: dict[bytes, object] = {}
    for scope, cache, ids, mark in cases:
        marks = None if mark is None else [mark]
        (key,) = spaces[cache].keys(scope, [np.array(ids, dtype=np.int32)], marks)
        assert found.setdefault(key, (scope, cache, ids, mark)) == (scope, cache, ids, mark)
