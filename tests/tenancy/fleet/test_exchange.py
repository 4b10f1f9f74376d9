"""Three servers, a real NATS between them, and one limit: what they admit together, and how fast a key ends."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from inferctl.config.spec import Access
from inferctl.tenancy.access import channel
from inferctl.tenancy.fleet.key_store import KeyStore
from tests.processes import CLIENT, ServerProcess, inferctl, start, until
from tests.tenancy.key_files import add
from tests.tenancy.parts import Nats, Postgres

LIMIT = 120  # requests per minute


@dataclass
class Fleet:
    """Three servers with the echo engine, each with a folder of its own, as on three machines."""

    servers: list[ServerProcess]
    folder: Path
    address: str

    def add(self, **fields: object) -> tuple[str, str]:
        """Create a key in the store, and return its id and the key when every server accepts it."""
        (self.folder / "new.json").unlink(missing_ok=True)
        key, secret = add(self.folder / "new.json", **fields)
        store = KeyStore.open(self.address)
        with store.edit() as found:
            found[key.id] = key
        store.close()
        until(lambda: all(self.status(server, secret, "GET") == 200 for server in self.servers))
        return key.id, secret

    def status(self, server: ServerProcess, secret: str, method: str = "POST") -> int:
        path = "/v1/embeddings" if method == "POST" else "/v1/models"
        body = {"json": {"input": "hello"}} if method == "POST" else {}
        headers = {"authorization": f"Bearer {secret}"}
        return CLIENT.request(method, f"{server.url}{path}", headers=headers, **body).status_code

    def keys(self, *arguments: str, broker: str | None) -> None:
        environment = {"INFERCTL_ACCESS_BROKER": broker} if broker else {}
        environment |= {name: value for name, value in os.environ.items() if not name.startswith("INFERCTL_ACCESS")}
        inferctl("keys", *arguments, "--keys", self.address, cwd=self.folder, env=environment, code=0)

    def offer(self, secret: str, rate: float, seconds: float) -> int:
        """Send requests at `rate` per second and server, and return how many were admitted."""

        def send(server: ServerProcess) -> int:
            begin, admitted = time.monotonic(), 0
            with httpx.Client(timeout=30) as client:
                for number in range(int(rate * seconds)):
                    time.sleep(max(0.0, begin + number / rate - time.monotonic()))
                    headers = {"authorization": f"Bearer {secret}"}
                    found = client.post(f"{server.url}/v1/embeddings", json={"input": "hello"}, headers=headers)
                    assert found.status_code in (200, 429), found.text
                    admitted += found.status_code == 200
            return admitted

        with ThreadPoolExecutor(len(self.servers)) as threads:
            return sum(threads.map(send, self.servers))

    def shared(self, secret: str) -> bool:
        """Whether all servers hear of each other: then they show the whole limit."""
        headers = {"authorization": f"Bearer {secret}"}
        found = [
            CLIENT.post(f"{server.url}/v1/embeddings", json={"input": "x"}, headers=headers).headers
            for server in self.servers
        ]
        return all(each["x-ratelimit-limit-requests"] == "100000" for each in found)


@pytest.fixture
def fleet(
    nats: Nats, postgres: Postgres, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    address = postgres.url()
    for name, value in {"KEYS": address, "BROKER": nats.url, "REPLICAS": "3"}.items():
        monkeypatch.setenv(f"INFERCTL_ACCESS_{name}", value)
    started = Fleet([], tmp_path, address)
    for number in range(3):
        folder = tmp_path / f"machine{number}"
        folder.mkdir()
        started.servers.append(start(folder, "--model", str(minilm), "--engine", "echo", "--name", "echo"))
    for server in started.servers:
        server.wait_ready()
    yield started
    for server in started.servers:
        server.kill()


@pytest.mark.slow
def test_three_servers_apply_one_limit_with_and_without_the_broker(fleet: Fleet, nats: Nats) -> None:
    _, probe = fleet.add(requests_per_minute=100_000)
    until(lambda: fleet.shared(probe), 20)
    _, secret = fleet.add(requests_per_minute=LIMIT)
    admitted = fleet.offer(secret, 10 * LIMIT / 60 / 3, 15)
    assert 0.9 * LIMIT <= admitted <= 1.05 * LIMIT
    # The limit is used on all servers, also if only one of them is asked.
    assert [fleet.status(server, secret) for server in fleet.servers] == [429] * 3

    _, second = fleet.add(requests_per_minute=LIMIT)
    nats.kill()
    until(lambda: not fleet.shared(probe), 20)
    assert 0.9 * LIMIT <= fleet.offer(second, 10 * LIMIT / 60 / 3, 15) <= LIMIT, "limit / 3 each"

    nats.start()
    until(lambda: fleet.shared(probe), 20)
    # What the servers admitted while they did not hear of each other counts everywhere now.
    assert fleet.offer(second, 5, 2) <= 0.1 * LIMIT

    # The broker goes silent while a key is used; the connections stay open.
    _, third = fleet.add(requests_per_minute=LIMIT)
    threading.Timer(2, nats.signal, (signal.SIGSTOP,)).start()
    admitted = fleet.offer(third, 10 * LIMIT / 60 / 3, 15)
    nats.signal(signal.SIGCONT)
    assert 0.6 * LIMIT <= admitted <= 1.05 * LIMIT
    logs = "".join(server.log.read_text() for server in fleet.servers)
    assert "the broker of limits and keys is lost" in logs
    assert secret not in logs
    assert "Traceback" not in logs


def test_a_revoked_key_ends_on_all_servers(fleet: Fleet, nats: Nats) -> None:
    first, secret = fleet.add()
    fleet.keys("revoke", first, broker=nats.url)
    until(lambda: all(fleet.status(server, secret) == 401 for server in fleet.servers), 10)
    second, secret = fleet.add()
    nats.kill()
    fleet.keys("revoke", second, broker=nats.url)  # warns
    until(lambda: all(fleet.status(server, secret) == 401 for server in fleet.servers), 30)


def test_servers_start_before_the_store_and_are_not_ready(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERCTL_ACCESS_KEYS", "postgresql://postgres@127.0.0.1:1/none")
    server = start(tmp_path, "--model", str(minilm), "--engine", "echo", "--name", "echo")
    try:
        response = CLIENT.post(f"{server.url}/v1/embeddings", json={"input": "x"}, headers={"x-api-key": "ik_x"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "access_unavailable")
        until(lambda: server.get("/readyz").text == "waiting for keys\n")
        until(lambda: "the key store" in server.log.read_text())
        settings = Access(keys="postgresql://postgres@127.0.0.1:1/none", data=str(tmp_path / "access"))
        _, secret = add(Path(settings.key_file or ""))
        until(lambda: server.get("/readyz").status_code == 200)
        assert CLIENT.get(f"{server.url}/v1/models", headers={"x-api-key": secret}).status_code == 200
    finally:
        server.kill()


def test_a_folder_with_a_long_path_has_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100) / "access"
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.bind(channel.address(folder))
        listening.listen()
        client.connect(channel.address(folder))
    assert (folder / "relay.sock").is_socket()
