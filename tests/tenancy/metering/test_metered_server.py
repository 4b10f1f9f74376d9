"""Real servers with metering, under load, while the parts behind them fail or are killed."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from inferctl.tenancy.metering.ledger import Ledger
from tests.processes import ServerProcess, until
from tests.tenancy.key_files import add
from tests.tenancy.parts import Postgres

ALL = (0, 2**62)
SECRET = "a-text-that-must-stay-private"
Metered = Callable[..., ServerProcess]


@pytest.fixture
def metered(minilm: Path, serve: Metered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Metered]:
    """`metered(mode="on", ...)` starts a server with the echo engine; options are settings of `metering`."""

    started: list[ServerProcess] = []

    def start(**settings: str) -> ServerProcess:
        for name, value in ({"mode": "on"} | settings).items():
            monkeypatch.setenv(f"INFERCTL_METERING_{name.upper()}", value)
        started.append(serve("--model", str(minilm), "--engine", "echo", "--name", "echo"))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
    # The relays of servers that a test killed end by themselves.
    until(lambda: not relays(tmp_path), 60)


def relays(folder: Path) -> list[int]:
    """The processes of relays that work in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                b"inferctl.tenancy.relay" in (process / "cmdline").read_bytes()
                and (process / "cwd").readlink() == folder
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


class Load:
    """Clients that send requests, with a pause of `pause_s` after each, until `stop`.

    `statuses`: of the responses they got. Without a pause, they take all cores from the tests beside this one.
    """

    def __init__(self, url: str, clients: int = 8, pause_s: float = 0.02) -> None:
        self.statuses: Counter[int] = Counter()
        self._url, self._pause_s, self._stopping = url, pause_s, threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._stopping.is_set():
                try:
                    response = client.post(f"{self._url}/v1/embeddings", json={"input": SECRET})
                except httpx.HTTPError:
                    self.statuses[0] += 1
                    time.sleep(0.05)
                else:
                    self.statuses[response.status_code] += 1
                    self._stopping.wait(self._pause_s)

    def stop(self) -> Counter[int]:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        return self.statuses


def ledger_of(folder: Path, address: str | None = None) -> Ledger:
    return Ledger.read(address or f"sqlite:///{folder}/metering/ledger.sqlite")


def rows(ledger: Ledger, **where: Any) -> int:
    found = ledger.usage(["status"], *ALL)
    return sum(row["requests"] for row in found if where.items() <= row.items())


def test_after_sigterm_under_load_the_ledger_has_every_accepted_request(metered: Metered, tmp_path: Path) -> None:
    server = metered()
    load = Load(server.url, pause_s=0)
    until(lambda: load.statuses[200] > 500, 60)
    assert server.stop() == 0, server.log.read_text()
    statuses = load.stop()
    ledger = ledger_of(tmp_path)
    assert rows(ledger, status=200) == statuses[200] > 500
    assert (ledger.gaps(*ALL), ledger.unclean_ends(*ALL)) == ([], [])
    folder = tmp_path / "metering"
    assert sorted(file.name for file in folder.iterdir()) == ["instance", "ledger.sqlite", "relay.lock"]
    found = ledger.usage(["key", "model", "endpoint", "task", "status"], *ALL)
    (row,) = [row for row in found if row["status"] == 200]
    assert (row["key"], row["model"], row["endpoint"], row["task"]) == (None, "echo", "embeddings", "embed")
    assert row["input_tokens"] > row["requests"]
    for file in folder.iterdir():
        assert SECRET.encode() not in file.read_bytes()


def test_an_alias_names_the_model_in_requests_only(
    metered: Metered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses, cache, scopes of keys and usage have the real name."""
    alias, keys = "text-embedding-3-small", tmp_path / "keys.json"
    _, secret = add(keys, models=["echo"])
    _, other = add(keys, models=[alias])  # of another server, whose model has this name
    for name, value in {"SERVE_ALIASES": f"{alias}, a/b", "CACHE_SIZE": "1MiB", "ACCESS_KEYS": str(keys)}.items():
        monkeypatch.setenv(f"INFERCTL_{name}", value)
    server = metered()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret, max_retries=0) as client:
        assert [each.id for each in client.models.list()] == ["echo", alias, "a/b"]
        assert [client.models.retrieve(name).id for name in ("echo", alias, "a/b")] == ["echo", alias, "a/b"]
        found = [client.embeddings.create(model=name, input="the same") for name in ("echo", alias, "a/b")]
        assert {each.model for each in found} == {"echo"}
        with pytest.raises(openai.NotFoundError, match=f"'echo' or '{alias}' or 'a/b'"):
            client.embeddings.create(model="text-embedding-3-large", input="x")
        with pytest.raises(openai.NotFoundError, match=r"POST to .*/v1/embeddings") as missing:
            client.with_options(base_url=server.url).post("/embedding", cast_to=object, body={"input": "x"})
        assert missing.value.code == "not_found"
        with pytest.raises(openai.PermissionDeniedError):
            client.with_options(api_key=other).embeddings.create(model=alias, input="x")
    assert server.stop() == 0
    rows_of = {row["model"]: (row["requests"], row["inputs"]) for row in ledger_of(tmp_path).usage(["model"], *ALL)}
    assert rows_of.keys() == {"echo"} and rows_of["echo"][1] == 3
    (cached,) = [row["cached_tokens"] for row in ledger_of(tmp_path).usage([], *ALL)]
    assert cached == 2 * found[0].usage.prompt_tokens


def test_the_ledger_counts_all_rejected_requests_in_few_rows_and_none_that_anyone_can_send(
    metered: Metered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = add(tmp_path / "keys.json", requests_per_minute=10)
    other, other_secret = add(tmp_path / "keys.json", team="t")
    monkeypatch.setenv("INFERCTL_ACCESS_KEYS", str(tmp_path / "keys.json"))
    monkeypatch.setenv("INFERCTL_ACCESS_OPEN", "docs")
    server = metered(mode="required")
    for number in range(20):
        headers = {"authorization": f"Bearer wrong{number}"}
        response = httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}, headers=headers)
        assert response.status_code == 401
    address = urlsplit(server.url)
    # Its head is valid, and its body is not: the connection rejects it before its key is checked.
    bad_body = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nno length\r\n"
    for sent in (b"GARBAGE\r\n\r\n", bad_body):
        with socket.create_connection((address.hostname, address.port)) as connected:
            connected.sendall(sent)
            assert b" 400 " in connected.recv(4096)
    assert httpx.get(f"{server.url}/docs").status_code == 200
    large = b'{"input": "' + bytes(5 << 20) + b'"}'
    requests = [
        ("POST", "/v1/embeddings", b'{"input": ["a", "b"]}'),  # 429 after the tenth one
        ("POST", "/v1/embeddings", b"{"),
        ("POST", "/v1/nothing", b"{}"),
        ("POST", "/v1/embeddings", large),
        ("GET", "/v1/models", b""),
    ]
    seen: Counter[tuple[str, int]] = Counter()
    with httpx.Client(base_url=server.url) as client:
        for number in range(100):
            for method, path, body in requests if number < 5 else requests[:1]:
                for key_id, value in ((key.id, secret), (other.id, other_secret)):
                    headers = {"authorization": f"Bearer {value}"}
                    response = client.request(method, path, content=body, headers=headers)
                    seen[key_id, response.status_code] += 1
    assert {status for _, status in seen} == {200, 400, 404, 413, 429}
    assert server.stop() == 0
    ledger = ledger_of(tmp_path)
    found = ledger.usage(["key", "status"], *ALL)
    assert {(row["key"], row["status"]): row["requests"] for row in found} == seen
    teams = {row["team"]: row["requests"] for row in ledger.usage(["team"], *ALL)}
    assert teams == {"t": sum(seen[each] for each in seen if each[0] == other.id), None: teams["t"]}
    assert sum(row["inputs"] for row in found) == sum(row["input_tokens"] for row in found) // 3
    assert ledger.gaps(*ALL) == []
    with sqlite3.connect(tmp_path / "metering" / "ledger.sqlite") as connection:
        (count,) = connection.execute("select count(*) from usage_events where status >= 400").fetchone()
    assert count < sum(seen[each] for each in seen if each[1] >= 400) / 2


def test_three_kills_of_the_relay_lose_and_repeat_nothing(metered: Metered, tmp_path: Path) -> None:
    server = metered()
    load = Load(server.url)
    killed: set[int] = set()

    def stored() -> float:
        return load.statuses[200] - server.metric("inferctl_outbox_events")

    for _ in range(3):
        until(lambda: bool(set(relays(tmp_path)) - killed), 60)
        more = stored() + 50
        until(lambda more=more: stored() > more, 60)  # type: ignore[misc]  # it stores some
        for pid in set(relays(tmp_path)) - killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
    until(lambda: bool(set(relays(tmp_path)) - killed), 60)
    assert server.stop() == 0
    statuses = load.stop()
    ledger = ledger_of(tmp_path)
    assert (rows(ledger, status=200), ledger.gaps(*ALL)) == (statuses[200], [])
    assert server.log.read_text().count("the relay was killed by signal 9; starting it again") == 3


def test_a_stopped_database_does_not_affect_requests(metered: Metered, tmp_path: Path, postgres: Postgres) -> None:
    address = postgres.url()
    server = metered(ledger=address)
    load = Load(server.url)
    until(lambda: load.statuses[200] > 100, 60)
    postgres.signal(signal.SIGSTOP)
    try:
        until(lambda: server.metric("inferctl_outbox_age_seconds") > 2, 60)
        before = load.statuses[200]
        until(lambda: load.statuses[200] > before + 100, 30)
    finally:
        postgres.signal(signal.SIGCONT)
    postgres.kill()
    until(lambda: server.metric("inferctl_outbox_age_seconds") > 2, 60)
    postgres.start()
    until(lambda: server.metric("inferctl_outbox_age_seconds") < 2, 60)
    assert set(load.statuses) == {200}
    assert server.stop() == 0
    statuses = load.stop()
    ledger = ledger_of(tmp_path, address)
    assert (rows(ledger, status=200), ledger.gaps(*ALL)) == (statuses[200], [])


@pytest.mark.parametrize("mode", ["on", "required"])
def test_a_full_outbox_drops_events_or_rejects_requests(
    metered: Metered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The ledger does not exist, the outbox has place for some events, and the memory for 300 more."""
    folder = tmp_path / "python"
    folder.mkdir()
    patch = (
        "import inferctl.tenancy.metering.recorder as r\nr.EventRecorder.__init__.__kwdefaults__['max_pending'] = 300\n"
    )
    (folder / "sitecustomize.py").write_text(patch)
    monkeypatch.setenv("INFERCTL_SERVE_DRAIN_SECONDS", "3")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    server = metered(mode=mode, outbox_size="64kB", ledger="sqlite:////proc/none/ledger.sqlite")
    load = Load(server.url)
    if mode == "required":
        until(lambda: load.statuses[503] > 10, 60)
        response = server.embed(input="a")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "metering_unavailable")
        assert server.metric("inferctl_outbox_dropped_events") == 0
        assert server.get("/readyz").status_code == 200
    else:
        until(lambda: server.metric("inferctl_outbox_dropped_events") > 10, 60)
        assert server.embed(input="a").status_code == 200
    until(lambda: "USAGE EVENTS CANNOT BE WRITTEN: database or disk is full" in server.log.read_text(), 30)
    server.stop()
    load.stop()


def test_two_servers_share_a_folder(metered: Metered, tmp_path: Path) -> None:
    first = metered()
    second = metered()
    for _ in range(5):
        assert first.embed(input="a").status_code == second.embed(input="a").status_code == 200
    assert first.stop() == 0
    assert second.embed(input="a").status_code == 200
    assert second.stop() == 0
    ledger = ledger_of(tmp_path)
    assert (rows(ledger, status=200), ledger.gaps(*ALL), ledger.unclean_ends(*ALL)) == (11, [], [])
    assert len(ledger.usage(["source"], *ALL)) == 2
