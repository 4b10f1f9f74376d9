"""The shared level of the cache, on a real Valkey server: servers share vectors, and its failures cost them nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferctl.core.errors import UsageError
from inferctl.serve.vector_cache.shared import SharedLevel
from tests.access.test_keys import add
from tests.processes import CLIENT, ServerProcess, execute, start, until
from tests.required import missing
from tests.serve.test_vector_cache import CACHED, computed, spec, vectors


@dataclass
class Valkey:
    """A running Valkey server on a Unix socket."""

    socket: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        command = ["valkey-server", "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        command += ["--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lfu"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=self.socket.parent)
        until(self.socket.exists)

    def count(self) -> int:
        """Return the number of stored values."""
        done = execute("valkey-cli", "-s", self.socket, "dbsize", code=0)
        return int(done.stdout)

    def signal(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """Skips without valkey-server, or fails with INFERCTL_REQUIRE=services."""
    if not shutil.which("valkey-server"):
        missing("services", "valkey-server is not installed")
    started = Valkey(tmp_path_factory.mktemp("valkey") / "s")
    started.start()
    yield started
    started.kill()


@pytest.fixture
def sharing(
    minilm: Path, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], ServerProcess]]:
    """`sharing()` starts a server with the echo engine and a shared level."""
    started: list[ServerProcess] = []

    def run() -> ServerProcess:
        folder = tmp_path_factory.mktemp("sharing")
        file = spec(folder, minilm, cache={"size": "1MiB", "shared": valkey.url})
        started.append(start(folder, "--spec", str(file), "--engine", "echo"))
        until(lambda: started[-1].metric("inferctl_cache_shared_up") == 1)
        return started[-1]

    yield run
    for server in started:
        server.kill()


def test_a_server_uses_what_another_one_computed(sharing: Callable[[], ServerProcess], valkey: Valkey) -> None:
    first, second = sharing(), sharing()
    # A test that runs again must not find what it stored before.
    run, stored = uuid.uuid4().hex, valkey.count()
    texts = [f"shared text {run} {n}" for n in range(20)]
    wanted = vectors(first.embed(input=texts))
    until(lambda: valkey.count() == stored + 20)  # they are written in the background
    before = computed(second)
    found = second.embed(input=[*texts, f"its own text {run}"])
    assert vectors(found)[:20] == wanted
    assert computed(second) - before == 1
    assert second.metric("inferctl_cache_hits_total", level="shared") == 20
    assert int(found.headers[CACHED]) < int(found.headers["x-inferctl-tokens"])
    assert CACHED in second.embed(input=texts).headers
    assert second.metric("inferctl_cache_hits_total", level="shared") == 20  # the others were local


def test_a_value_that_is_no_vector_is_ignored(sharing: Callable[[], ServerProcess], valkey: Valkey) -> None:
    server, stored = sharing(), valkey.count()
    text = f"a text {uuid.uuid4().hex}"
    wanted = vectors(server.embed(input=text))
    until(lambda: valkey.count() == stored + 1)
    script = "for _, key in ipairs(redis.call('keys', 'inferctl:*')) do redis.call('set', key, 'x') end"
    subprocess.run(["valkey-cli", "-s", str(valkey.socket), "eval", script, "0"], check=True, capture_output=True)
    other = sharing()
    assert vectors(other.embed(input=text)) == wanted
    assert other.metric("inferctl_cache_hits_total", level="shared") == 0


def test_a_stopped_server_is_no_longer_asked_after_three_failures(
    sharing: Callable[[], ServerProcess], valkey: Valkey
) -> None:
    server = sharing()
    vectors(server.embed(input="before"))
    valkey.signal(signal.SIGSTOP)
    try:
        for number in range(3):
            assert vectors(server.embed(input=f"stopped {number}"))
        # On a busy machine, the first call may be one of the three failures in a row.
        assert server.metric("inferctl_cache_shared_failures_total") >= 3
        assert server.metric("inferctl_cache_shared_up") == 0
        failures = server.metric("inferctl_cache_shared_failures_total")
        for number in range(20):
            assert vectors(server.embed(input=f"still stopped {number}"))
        # Only probes in the background failed.
        assert server.metric("inferctl_cache_shared_failures_total") - failures <= 5
    finally:
        valkey.signal(signal.SIGCONT)
    until(lambda: server.metric("inferctl_cache_shared_up") == 1)
    assert vectors(server.embed(input="after"))


def test_requests_succeed_while_the_shared_level_is_killed_and_comes_back(
    sharing: Callable[[], ServerProcess], valkey: Valkey
) -> None:
    server = sharing()
    valkey.kill()
    for number in range(10):
        assert vectors(server.embed(input=f"killed {number}"))
    valkey.socket.unlink(missing_ok=True)
    valkey.start()
    until(lambda: server.metric("inferctl_cache_shared_up") == 1)
    assert vectors(server.embed(input="it is back"))


def test_a_server_starts_without_its_shared_level(
    minilm: Path, tmp_path: Path, serve: Callable[..., ServerProcess]
) -> None:
    file = spec(tmp_path, minilm, cache={"size": "1MiB", "shared": f"unix://{tmp_path}/nothing"})
    server = serve("--spec", str(file), "--engine", "echo")
    assert vectors(server.embed(input="alone"))
    assert "no connection to the Valkey server" in server.log.read_text()


def test_a_bad_url_is_an_error_without_its_password() -> None:
    with pytest.raises(UsageError) as caught:
        SharedLevel("http://user:secret@host")
    assert "secret" not in str(caught.value)


@dataclass
class Tenants:
    """A server and the keys of its two tenants."""

    server: ServerProcess
    keys: tuple[str, str]
    tolerance: float


WORDS = ["river", "rivers", "the river", "river the", "rivet", "rivers,", "a river", "river river", "1", "10"]


@pytest.fixture(scope="module")
def tenants(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, valkey: Valkey
) -> Iterator[list[Tenants]]:
    """Servers of the same weights that share a Valkey server. They differ in precision or prompt; two are equal."""
    plain, prompted = (tiny("bert", "mean_tokens") for _ in range(2))
    for folder in (plain, prompted):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [8, 16]}))
    prompts = {"prompts": {"query": "a query: "}, "default_prompt_name": "query"}
    (prompted / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    found = []
    for model, precision in ((plain, "fp32"), (plain, "bf16"), (prompted, "fp32"), (plain, "fp32")):
        folder = tmp_path_factory.mktemp("tenants")
        keys = [add(folder / "keys.json", name)[1] for name in ("first", "second")]
        cache = {"size": "1MiB", "shared": valkey.url}
        access = {"keys": str(folder / "keys.json"), "open": ["metrics"]}
        file = spec(folder, model, cache=cache, access=access, serve={"precision": precision, "max_batch_tokens": 256})
        server = start(folder, "--spec", str(file))
        found.append(Tenants(server, (keys[0], keys[1]), 0.02 if precision == "bf16" else 1e-4))
    yield found
    for one in found:
        one.server.kill()


@pytest.mark.slow
@settings(max_examples=100)
@given(
    which=st.integers(0, 3),
    tenant=st.integers(0, 1),
    texts=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6),
    dimensions=st.sampled_from([None, 8, 16]),
)
def test_a_vector_is_never_wrong(
    tenants: list[Tenants], which: int, tenant: int, texts: list[str], dimensions: int | None
) -> None:
    """Each response equals what the same server computes without its cache."""
    subject = tenants[which]
    body: dict[str, Any] = {"input": texts} | ({"dimensions": dimensions} if dimensions else {})

    def embed(**headers: str) -> np.ndarray[Any, Any]:
        headers |= {"authorization": f"Bearer {subject.keys[tenant]}"}
        return np.array(vectors(CLIENT.post(f"{subject.server.url}/v1/embeddings", json=body, headers=headers)))

    fresh = embed(**{"cache-control": "no-store"})
    for _ in range(2):
        np.testing.assert_allclose(embed(), fresh, atol=subject.tolerance)


@pytest.mark.slow
def test_the_texts_of_the_property_differ_by_more_than_its_tolerance(tenants: list[Tenants]) -> None:
    """Otherwise the test above would not notice a wrong vector."""
    found = []
    for subject in tenants[:3]:
        headers = {"authorization": f"Bearer {subject.keys[0]}", "cache-control": "no-store"}
        response = CLIENT.post(f"{subject.server.url}/v1/embeddings", json={"input": WORDS}, headers=headers)
        found.append(np.array(vectors(response)))
    for matrix, subject in zip(found, tenants, strict=False):
        distances = np.abs(matrix[:, None] - matrix[None]).max(axis=2) + np.eye(len(WORDS))
        assert distances.min() > 2 * subject.tolerance
    assert np.abs(found[0] - found[2]).max(axis=1).min() > 2e-4
