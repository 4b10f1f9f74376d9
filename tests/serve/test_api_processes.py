"""Servers with several API processes: limits, cache, counts and events are those of one server, and no process stays.

Real processes, the echo engine. Most tests share one server with four API processes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from inferctl.config.spec import Spec
from inferctl.core.errors import EXIT_INTERRUPTED
from inferctl.core.sizes import parse_size
from inferctl.serve.engines.echo import FAILING_TOKEN, SLOW_TOKEN
from inferctl.serve.lifetime import without_stores
from inferctl.serve.observe import samples
from inferctl.serve.signals import EXIT_TERMINATED
from tests.processes import ServerProcess, inferctl, until, write_spec
from tests.tenancy.key_files import add
from tests.tenancy.metering.test_metered_server import Load

PROCESSES = 4
BATCH_TOKENS, QUEUE_TOKENS = 256, 4096
# Of keys: name -> fields. Each is used by one test, so that its events are those of the test.
KEYS: dict[str, dict[str, Any]] = {
    "admin": {"admin": True},
    "plain": {},
    "requests": {"requests_per_minute": 600},
    "tokens": {"tokens_per_minute": 6000},
    "few bytes": {"tokens_per_minute": 2000},
    "few chunks": {"tokens_per_minute": 2000},
    **{f"few requests {path}": {"requests_per_minute": 10} for path in ("/tokenize", "/v1/embeddings", "/nothing")},
    "counted": {},
    "killed": {},
    "left": {},
    "queued": {},
}


def code_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


class Client:
    """A connection that stays open. `port`: its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.port = int(writer.get_extra_info("sockname")[1])

    @classmethod
    async def open(cls, url: str) -> Self:
        address = urlsplit(url)
        return cls(*await asyncio.open_connection(address.hostname, address.port))

    def send(self, body: Any = None, key: str | None = None, path: str = "/v1/embeddings", **headers: str) -> None:
        """Send a request: a POST, unless `body` is None. A text as body is sent in one chunk, without its size."""
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "host: a", "content-type: application/json"]
        lines += [f"authorization: Bearer {key}"] if key else []
        if isinstance(body, str):
            content = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body.encode())
            lines.append("transfer-encoding: chunked")
        else:
            content = b"" if body is None else json.dumps(body).encode()
            headers = {"content_length": str(len(content))} | headers
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self._writer.write("\r\n".join([*lines, "\r\n"]).encode() + content)

    async def answer(self) -> httpx.Response:
        """Return the next response. Raises `ConnectionError` or `IncompleteReadError` after a reset."""
        head, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = httpx.Headers([(name, value) for name, _, value in (line.partition(": ") for line in lines)])
        content = await self._reader.readexactly(int(headers["content-length"]))
        return httpx.Response(int(head.split()[1]), headers=headers, content=content)

    async def ask(self, body: Any = None, key: str | None = None, **more: str) -> httpx.Response:
        self.send(body, key, **more)
        return await self.answer()

    def close(self) -> None:
        self._writer.close()


@dataclass
class Pool:
    """A server with several API processes. `secrets` and `ids` of its keys: by name."""

    server: ServerProcess
    secrets: dict[str, str]
    ids: dict[str, str]

    @property
    def pids(self) -> list[int]:
        return self.server.api_pids()

    async def one_of_each(self) -> list[Client]:
        """Return a connection to each API process. On a busy machine, the first ones may not be shared evenly."""
        found: dict[int, Client] = {}
        for _ in range(20):
            for client in await self.clients(PROCESSES):
                found.setdefault(self.owners()[client.port], client)
            if len(found) == PROCESSES:
                return list(found.values())
        raise AssertionError(f"connections went to {len(found)} of {PROCESSES} processes")

    async def clients(self, count: int) -> list[Client]:
        """Open connections, and return them when API processes have them."""
        found = await asyncio.gather(*(Client.open(self.server.url) for _ in range(count)))
        await asyncio.to_thread(until, lambda: {client.port for client in found} <= self.owners().keys())
        return list(found)

    def owners(self) -> dict[int, int]:
        """The process of each connection, by the port of its client."""
        ports = {}
        for pid in self.pids:
            for each in psutil.Process(pid).net_connections("tcp"):
                if each.raddr:
                    ports[each.raddr.port] = pid
        return ports

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = self.server.get("/info", self.secrets["admin"]).json()["api_processes"]
        return found

    def wait_complete(self) -> None:
        until(lambda: self.info()["up"] == PROCESSES)

    def recorded(self, key: str) -> dict[int, tuple[int, int]]:
        """What the ledger has of a key: status -> requests, and input tokens that no cache had."""
        return {
            int(row["status"]): (row["requests"], row["input_tokens"] - row["cached_tokens"])
            for row in self.server.usage("key", "status")
            if row["key"] == self.ids[key]
        }


def counters(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The counters and histograms of a scrape. Fails if one appears twice."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.type in ("counter", "histogram") and not sample.name.endswith("_created"):
                key = sample.name, frozenset(sample.labels.items())
                assert key not in found
                found[key] = sample.value
    return found


def _without_time(found: dict[Any, float]) -> dict[Any, float]:
    """The counters that stand still without requests."""
    return {key: value for key, value in found.items() if key[0] != "inferctl_thread_seconds_total"}


def sum_of(found: dict[Any, float], name: str, **labels: str) -> float:
    return sum(value for (each, with_), value in found.items() if each == name and labels.items() <= set(with_))


@pytest.fixture(scope="module")
def shared(minilm: Path, tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> Pool:
    folder = tmp_path_factory.mktemp("pool")
    added = {name: add(folder / "keys.json", name, **fields) for name, fields in KEYS.items()}
    write_spec(
        folder,
        minilm,
        access={"keys": "keys.json", "open": ["metrics"]},
        metering={"mode": "on"},
        cache={"size": "16MiB"},
        serve={"max_batch_tokens": BATCH_TOKENS, "max_queue_tokens": QUEUE_TOKENS},
    )
    options = ("--spec", "inferctl.yaml", "--engine", "echo", "--api-processes", str(PROCESSES))
    return Pool(
        serve_module(*options, place=folder),
        {name: secret for name, (_, secret) in added.items()},
        {name: key.id for name, (key, _) in added.items()},
    )


@pytest.fixture
def pool(shared: Pool) -> Pool:
    """The shared server, with all its processes."""
    shared.server.wait_ready()
    shared.wait_complete()
    return shared


async def load(
    pool: Pool,
    clients: int,
    each: int,
    body: Callable[[int], Any],
    key: str,
    on_answer: Callable[[httpx.Response], None] = lambda _: None,
    path: str = "/v1/embeddings",
) -> list[httpx.Response]:
    """Let clients send `each` requests, one after the other, and return all answers."""
    answers: list[httpx.Response] = []

    async def run(client: Client, first: int) -> None:
        for number in range(first, first + each):
            answers.append(await client.ask(body(number), pool.secrets[key], path=path))
            on_answer(answers[-1])

    opened = await pool.clients(clients)
    await asyncio.gather(*(run(client, each * number) for number, client in enumerate(opened)))
    for client in opened:
        client.close()
    return answers


# Path, body, and how many of how many requests get which status.
EXACT: dict[str, tuple[str, Any, int, int, int]] = {
    "requests": ("/v1/embeddings", {"input": [[5] * 10]}, 600, 768, 200),
    "tokens": ("/v1/embeddings", {"input": [[5] * 10]}, 600, 768, 200),
    # Of what is not computed, three processes admitted 300 of 300 with a limit of 10.
    "few requests /tokenize": ("/tokenize", {"inputs": "a"}, 10, 64, 200),
    "few requests /v1/embeddings": ("/v1/embeddings", {"input": "a", "model": "another"}, 10, 64, 404),
    "few requests /nothing": ("/nothing", {}, 10, 64, 404),
}


@pytest.mark.parametrize("key", EXACT)
def test_a_limit_of_a_key_is_exact_for_all_processes(pool: Pool, key: str) -> None:
    path, body, admitted, sent, status = EXACT[key]
    answers = asyncio.run(load(pool, 64, sent // 64, lambda _: body, key, path=path))
    assert Counter(answer.status_code for answer in answers) == {status: admitted, 429: sent - admitted}
    if path != "/tokenize":  # whose errors have no code
        assert {code_of(answer) for answer in answers if answer.status_code == 429} == {"rate_limit_exceeded"}
    limit = "tokens" if key == "tokens" else "requests"
    assert min(int(answer.headers[f"x-ratelimit-remaining-{limit}"]) for answer in answers) == 0


@pytest.mark.parametrize("declared", [True, False])
def test_a_limit_of_tokens_bounds_the_bytes_of_bodies(pool: Pool, declared: bool) -> None:
    body = {"input": [[5]], "user": "a" * 230_000}  # 898 tokens
    key = "few bytes" if declared else "few chunks"
    answers = asyncio.run(load(pool, 16, 1, lambda _: body if declared else json.dumps(body), key))
    assert Counter(answer.status_code for answer in answers) == {200: 2, 429: 14}


def test_equal_requests_in_all_processes_are_computed_once(pool: Pool) -> None:
    misses, batches = (
        pool.server.metric(name) for name in ("inferctl_cache_misses_total", "inferctl_batch_tokens_sum")
    )
    answers = asyncio.run(load(pool, 500, 1, lambda _: {"input": [[SLOW_TOKEN, 7]] * 2}, "plain"))
    answers += asyncio.run(load(pool, 500, 1, lambda _: {"input": [[SLOW_TOKEN, 7]] * 2}, "plain"))
    assert {answer.status_code for answer in answers} == {200}
    assert len({json.dumps(answer.json()["data"]) for answer in answers}) == 1
    assert pool.server.metric("inferctl_cache_misses_total") - misses == 1
    assert pool.server.metric("inferctl_batch_tokens_sum") - batches == 2


def test_metrics_are_those_of_the_whole_server_and_never_fall(pool: Pool) -> None:
    def seen_by(answers: Iterable[httpx.Response]) -> dict[str, float]:
        found = Counter(f"status {answer.status_code}" for answer in answers)
        good = [answer.json() for answer in answers if answer.status_code == 200]
        found["tokens"] = sum(each["usage"]["total_tokens"] for each in good)
        found["inputs"] = sum(len(each["data"]) for each in good)
        return dict(found)

    def counted(now: dict[Any, float], before: dict[Any, float]) -> dict[str, float]:
        statuses = {f"status {status}": {"status": str(status)} for status in (200, 400, 401, 500)}
        found = {
            name: sum_of(now, "inferctl_requests_total", **labels) - sum_of(before, "inferctl_requests_total", **labels)
            for name, labels in statuses.items()
        }
        for name in ("tokens", "inputs"):
            found[name] = sum_of(now, f"inferctl_{name}_total") - sum_of(before, f"inferctl_{name}_total")
        return found

    async def scrapes() -> list[dict[Any, float]]:
        clients = await pool.one_of_each()
        return [counters((await client.ask(path="/metrics")).text) for client in clients]

    def body(number: int) -> Any:
        kinds = ([[101, number]], [[5, number], [6, 7, number]], [[FAILING_TOKEN, number]], [])
        return {"input": kinds[number % 4]}

    def scrape_on() -> None:
        last: dict[Any, float] = {}
        while not stopping.is_set():
            try:
                text = pool.server.get("/metrics").text
            except httpx.HTTPError:  # a killed process had this connection
                continue
            now = counters(text)
            fallen.extend(key for key, value in last.items() if now.get(key, -1) < value)
            last = now

    stopping, fallen = threading.Event(), []  # type: ignore[var-annotated]
    before = asyncio.run(scrapes())[0]
    answers = asyncio.run(load(pool, 16, 20, body, "plain"))
    pool.secrets["unknown"] = "ik_live_unknown"
    unknown = asyncio.run(load(pool, 8, 2, body, "unknown"))
    assert {code_of(answer) for answer in unknown} == {"invalid_api_key"}
    answers += unknown
    found = asyncio.run(scrapes())
    assert all(_without_time(each) == _without_time(found[0]) for each in found)
    assert counted(found[0], before) == seen_by(answers)

    # Of what a process counted, the last second may be missing after its end.
    restarts = pool.info()["restarts"]
    answers += asyncio.run(load(pool, 16, 20, body, "plain"))
    time.sleep(1.5)
    scraper = threading.Thread(target=scrape_on)
    scraper.start()
    try:
        os.kill(pool.pids[0], signal.SIGKILL)
        until(lambda: pool.info() == {"count": PROCESSES, "up": PROCESSES - 1, "restarts": restarts + 1})
        assert pool.server.get("/readyz").status_code == 200
        pool.wait_complete()
        answers += asyncio.run(load(pool, 8, 4, body, "plain"))
    finally:
        stopping.set()
        scraper.join()
    assert not fallen
    assert [counted(each, before) for each in asyncio.run(scrapes())] == [seen_by(answers)] * PROCESSES


def test_many_scrapes_at_once_cost_the_backend_little(pool: Pool) -> None:
    """Each takes 1 ms, in which no request is computed: a thousand clients together held up all others for 2.5 s."""
    backend = psutil.Process(pool.server.process.pid)

    async def seconds(clients: list[Client], each: int) -> float:
        """The CPU time of the backend for as many scrapes by each client."""
        before = sum(backend.cpu_times()[:2])
        for _ in range(each):
            answers = await asyncio.gather(*(client.ask(path="/metrics") for client in clients))
            assert {answer.status_code for answer in answers} == {200}
        return sum(backend.cpu_times()[:2]) - before

    async def run() -> tuple[float, float]:
        clients = await pool.clients(500)
        found = await seconds(clients[:1], 500), await seconds(clients, 1)
        for client in clients:
            client.close()
        return found

    alone, together = asyncio.run(run())
    assert together < alone / 4


def test_connections_are_shared_evenly(pool: Pool) -> None:
    async def largest(count: int) -> float:
        clients = await pool.clients(count)
        owners = pool.owners()
        shares = Counter(owners[client.port] for client in clients)
        for client in clients:
            client.close()
        ports = {client.port for client in clients}
        await asyncio.to_thread(until, lambda: not ports & pool.owners().keys())
        return max(shares.values()) / (count / PROCESSES)

    for count in (8, 64, 512):  # while one process gets no time, the others get its connections
        shares = (asyncio.run(largest(count)) for _ in range(5))
        assert any(share == pytest.approx(1, abs=0.05) for share in shares), count


def test_a_killed_process_takes_only_its_own_connections_along(pool: Pool) -> None:
    """And of the events of its requests, those of the last moment."""
    backend, restarts = psutil.Process(pool.server.process.pid), pool.info()["restarts"]
    open_files, answered, broken = backend.num_fds(), [], set()  # type: ignore[var-annotated]

    async def run(client: Client, number: int, end: asyncio.Event) -> None:
        try:
            while not end.is_set():
                number += 64
                answer = await client.ask({"input": [[5, number]]}, pool.secrets["killed"])
                assert answer.status_code == 200
                answered.append((time.monotonic(), client.port))
        except (ConnectionError, asyncio.IncompleteReadError):
            broken.add(client.port)

    async def kill_one() -> None:
        nonlocal killed_at, lost
        end, clients = asyncio.Event(), await pool.clients(64)
        running = [asyncio.create_task(run(client, number, end)) for number, client in enumerate(clients, 1)]
        await asyncio.sleep(1)
        victim = pool.pids[1]
        lost = {port for port, pid in pool.owners().items() if pid == victim}
        os.kill(victim, signal.SIGKILL)
        killed_at = time.monotonic()
        await asyncio.sleep(0.5)
        late = await asyncio.wait_for(asyncio.gather(*(Client.open(pool.server.url) for _ in range(8))), 5)
        for each in late:
            assert (await asyncio.wait_for(each.ask({"input": [[5]]}, pool.secrets["plain"]), 5)).status_code == 200
        end.set()
        await asyncio.gather(*running)
        for each in (*clients, *late):
            each.close()

    killed_at, lost = 0.0, set[int]()
    asyncio.run(kill_one())
    assert broken == lost & {port for _, port in answered}
    assert 0 < len(broken) < 32  # a busy machine does not share evenly
    pool.wait_complete()
    assert pool.info()["restarts"] == restarts + 1
    until(lambda: backend.num_fds() == open_files, 20)

    # Events are on disk after 20 ms. A busy machine needs longer.
    last = sum(port in broken and at > killed_at - 0.2 for at, port in answered)
    until(lambda: len(answered) - last <= pool.recorded("killed").get(200, (0, 0))[0])
    assert pool.recorded("killed")[200][0] <= len(answered) + len(broken)


def test_a_process_without_descriptors_keeps_no_connection_waiting(pool: Pool) -> None:
    """It has the fewest connections, as long as it refuses them."""

    async def run() -> None:
        clients = [await Client.open(pool.server.url) for _ in range(8)]
        answers = await asyncio.wait_for(asyncio.gather(*(client.ask(path="/livez") for client in clients)), 5)
        assert {answer.status_code for answer in answers} == {200}

    limits = resource.prlimit(pool.pids[3], resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        asyncio.run(run())
    finally:
        resource.prlimit(pool.pids[3], resource.RLIMIT_NOFILE, limits)


@pytest.mark.slow
def test_a_hung_process_is_replaced_and_others_answer_what_it_did_not_take(pool: Pool) -> None:
    async def run() -> None:
        taken, victim = await pool.clients(8), pool.pids[2]
        owners = pool.owners()
        os.kill(victim, signal.SIGSTOP)
        body, key = {"input": [[5, 6]]}, pool.secrets["plain"]
        early = await asyncio.gather(*(Client.open(pool.server.url) for _ in range(8)))
        waiting = [asyncio.create_task(client.ask(body, key)) for client in early]
        _, hanging = await asyncio.wait(waiting, timeout=2)
        assert 0 < len(hanging) < 8, "those that were passed to it"  # two, if all have equally many connections
        for _ in range(8):  # it is known to be silent
            client = await Client.open(pool.server.url)
            assert (await asyncio.wait_for(client.ask(body, key), 2)).status_code == 200
        await asyncio.wait(hanging, timeout=30)
        assert {task.result().status_code for task in waiting} == {200}
        for client in taken:
            if owners[client.port] != victim:
                assert (await client.ask(body, key)).status_code == 200
            else:
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await client.ask(body, key)

    restarts, began = pool.info()["restarts"], time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - began > 10
    assert pool.info()["restarts"] == restarts + 1
    pool.wait_complete()


def test_work_of_clients_that_leave_is_cancelled_and_metered(pool: Pool) -> None:
    server = pool.server
    rows = [[SLOW_TOKEN, *[5] * (BATCH_TOKENS - 10), number] for number in range(1, 16)]

    async def run() -> None:
        (filling,), queued = await pool.clients(1), await pool.clients(PROCESSES)
        filling.send({"input": rows}, pool.secrets["left"])
        await asyncio.to_thread(until, lambda: server.metric("inferctl_queue_tokens") > QUEUE_TOKENS / 2)
        for client in queued:  # a full queue rejects, for each process
            answer = await client.ask({"input": [[5] * 250] * 7}, pool.secrets["plain"], cache_control="no-store")
            assert (answer.status_code, code_of(answer)) == (429, "queue_full")
        for client in queued:
            client.send({"input": [[8, 9]]}, pool.secrets["queued"], cache_control="no-store")
        await asyncio.to_thread(until, lambda: server.metric("inferctl_requests_in_flight") == 1 + PROCESSES)
        for client in queued:
            client.close()
        await asyncio.to_thread(until, lambda: server.metric("inferctl_requests_in_flight") == 1)
        filling.close()

    until(lambda: server.metric("inferctl_requests_in_flight") == 0)
    before = server.metric("inferctl_batch_tokens_sum")
    asyncio.run(run())
    until(lambda: server.metric("inferctl_queue_tokens") == 0, 3)
    until(lambda: server.metric("inferctl_requests_in_flight") == 0)
    until(lambda: set(pool.recorded("left")) == set(pool.recorded("queued")) == {499})
    until(lambda: pool.recorded("queued") == {499: (PROCESSES, 0)})
    ((requests, tokens),) = pool.recorded("left").values()
    assert requests == 1
    assert 0 < tokens == server.metric("inferctl_batch_tokens_sum") - before < sum(map(len, rows)) / 2


def test_the_outboxes_of_all_processes_have_each_request(pool: Pool) -> None:
    """An engine is killed meanwhile."""

    def body(number: int) -> Any:
        return {"input": [[FAILING_TOKEN, number]] if number % 50 == 7 else [[5, number], [6, number, 9]]}

    engine = pool.server.children("inferctl.serve.engine_process.engine_main")[0]
    answered = itertools.count(1)

    def kill_engine(answer: httpx.Response) -> None:
        if answer.status_code == 200 and next(answered) == 600:
            os.kill(engine, signal.SIGKILL)

    answers = asyncio.run(load(pool, 32, 50, body, "counted", kill_engine))
    seen = Counter(answer.status_code for answer in answers)
    until(lambda: {status: count for status, (count, _) in pool.recorded("counted").items()} == seen)
    assert pool.recorded("counted")[200][1] == 5 * seen[200]
    assert seen[200] >= 600


def _send_in_vain(server: ServerProcess, rows: list[list[int]]) -> None:
    with pytest.raises(httpx.HTTPError):
        server.embed(input=rows)


def left(folder: Path) -> list[str]:
    """The processes that work in a folder: those of the servers that were started there."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.fixture
def two(minilm: Path, serve: Callable[..., ServerProcess]) -> Callable[..., ServerProcess]:
    """Starts a server with two API processes, and settings as variables of the environment."""
    echo = ("--model", str(minilm), "--engine", "echo", "--name", "echo")
    return lambda processes=2, **settings: serve(*echo, "--api-processes", str(processes), **settings)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("the backend is killed", -signal.SIGKILL),
        ("an API process is killed, then SIGTERM", 0),
        ("SIGINT", EXIT_INTERRUPTED),
        ("two SIGTERMs", EXIT_TERMINATED),
    ],
)
def test_no_process_is_left_after_the_end(
    two: Callable[..., ServerProcess], tmp_path: Path, end: str, code: int
) -> None:
    server = two()
    api = server.api_pids()
    assert len(api) == 2
    assert len(left(tmp_path)) == 4, "backend, API processes, engine"
    until(lambda: loop_times_are_of(server, api=api, backend=[server.process.pid]))
    clients = Load(server.url)
    until(lambda: clients.statuses[200] > 50)
    if end == "the backend is killed":
        server.process.kill()
    elif end == "SIGINT":
        os.killpg(server.process.pid, signal.SIGINT)
    elif end == "two SIGTERMs":
        slow = threading.Thread(target=_send_in_vain, args=(server, [[SLOW_TOKEN]] * 20))
        slow.start()
        until(lambda: server.metric("inferctl_queue_tokens") > 0)  # of `clients`, behind it
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "shutting down" in server.log.read_text())
        server.process.send_signal(signal.SIGTERM)
        slow.join()
    else:
        os.kill(api[0], signal.SIGKILL)
        until(lambda: "starting it again" in server.log.read_text())
        server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == code, server.log.read_text()
    clients.stop()
    until(lambda: not left(tmp_path), 10)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))
    assert "Traceback" not in server.log.read_text()


def test_after_the_backend_was_killed_the_ledger_gets_the_events_of_all_processes(
    two: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """The API processes notice it later than the relay, which has to wait for their last events."""
    server = two(INFERCTL_METERING_MODE="on")
    clients = Load(server.url)
    until(lambda: clients.statuses[200] > 50 and _requests(server) > 0)
    server.kill()
    seen = clients.stop()
    until(lambda: not left(tmp_path), 20)
    assert sorted(file.name for file in (tmp_path / "metering").iterdir()) == [
        "instance",
        "ledger.sqlite",
        "relay.lock",
    ]
    assert 0 <= _requests(server) - seen[200] <= 8, "of each client, the last response may not have arrived"


def _requests(server: ServerProcess) -> int:
    """How many requests with status 200 the ledger has."""
    return sum(row["requests"] for row in server.usage("status") if row["status"] == 200)


def test_processes_that_end_while_no_descriptors_are_left_are_replaced_later(two: Callable[..., ServerProcess]) -> None:
    server = two()
    backend, engine, api = (
        server.process.pid,
        server.children("inferctl.serve.engine_process.engine_main"),
        server.api_pids(),
    )
    limits = resource.prlimit(backend, resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.kill(engine[0], signal.SIGKILL)
    os.kill(api[0], signal.SIGKILL)
    for what in ("engine process", "API process"):
        until(lambda what=what: re.search(f"{what}.*: .*Too many open files", server.log.read_text()), 20)
    resource.prlimit(backend, resource.RLIMIT_NOFILE, limits)
    until(lambda: server.get("/info").json()["api_processes"]["up"] == 2)
    server.wait_ready()
    assert server.embed(input="a").status_code == 200


@pytest.mark.parametrize("cause", ["no tokenizer", "port in use", "no outbox"])
def test_a_start_that_fails_says_so_and_leaves_no_process(minilm: Path, tmp_path: Path, cause: str) -> None:
    model = tmp_path / "model"
    missing = ("tokenizer*", "vocab*") if cause == "no tokenizer" else ()
    shutil.copytree(minilm, model, ignore=shutil.ignore_patterns(*missing))
    env = dict(os.environ)
    if cause == "no outbox":  # nor a folder for it
        (tmp_path / "file").touch()
        env |= {"INFERCTL_METERING_MODE": "on", "INFERCTL_METERING_DATA": "file/metering"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1] if cause == "port in use" else 0)
        command = ("serve", "--model", model, "--engine", "echo", "--port", port, "--name", "echo")

        def end(processes: int) -> tuple[int, str]:
            done = inferctl(*command, "--api-processes", processes, cwd=tmp_path, env=env)
            return done.returncode, done.stderr[done.stderr.rindex("error: ") :]  # a relay may report the folder before

        code, said = end(2)
        assert (code, said) == end(1)
    assert code in (2, 3)
    assert "hint: " in said
    assert not left(tmp_path)


def test_one_api_process_is_the_server_itself(two: Callable[..., ServerProcess]) -> None:
    server = two(1)
    assert not server.api_pids()
    assert server.get("/info").json()["api_processes"] == {"count": 1, "up": 1, "restarts": 0}
    until(lambda: loop_times_are_of(server, api=[server.process.pid], backend=[]))


def loop_times_are_of(server: ServerProcess, **pids: list[int]) -> bool:
    """Whether the server has the times of the main threads of these processes, between two looks at them."""

    def seconds(process: str, column: int) -> float:
        texts = (Path(f"/proc/{pid}/task/{pid}/schedstat").read_text() for pid in pids[process])
        return sum(int(text.split()[column]) / 1e9 for text in texts)

    columns = {(process, state): column for process in pids for column, state in enumerate(("running", "waiting"))}
    before = {key: seconds(key[0], column) for key, column in columns.items()}
    found = counters(server.get("/metrics").text)
    labels = ({"process": process, "state": state, "thread": "event_loop"} for process, state in columns)
    seen = [sum_of(found, "inferctl_thread_seconds_total", **each) for each in labels]
    # The scheduler counts what runs now up to its last tick.
    return all(
        before[key] - 0.05 <= value <= seconds(key[0], column) + 0.05
        for value, (key, column) in zip(seen, columns.items(), strict=True)
    )


def test_api_processes_get_no_password_and_the_same_key_file_and_share_the_disk() -> None:
    secret = "password1"
    access = {
        "keys": f"postgresql://user:{secret}@db.example.com/keys",
        "broker": f"nats://user:{secret}@nats.example.com",
    }
    stores = {
        "access": access | {"requests_per_minute": 5},
        "metering": {
            "mode": "on",
            "ledger": f"postgresql://user:{secret}@db.example.com/ledger",
            "outbox_size": "1.5 GiB",
        },
    }
    whole = Spec.model_validate({"name": "m", "model": {"source": "a/b"}, **stores})
    sent = json.loads(json.dumps(without_stores(whole, 3)))
    assert secret not in str(sent)
    read = Spec.model_validate(sent)
    assert read.access.key_file == whole.access.key_file
    assert (read.access.requests_per_minute, read.metering.mode) == (5, "on")
    assert parse_size(read.metering.outbox_size) == 512 * 1024**2


def test_lost_events_of_a_process_that_ended_still_count() -> None:
    """If their number fell, an alert would report those of the others again."""

    def found(lost: int, waiting: int) -> samples.Samples:
        names = {"inferctl_outbox_dropped_events": lost, "inferctl_outbox_events": waiting}
        return [(name, "", "gauge", [(name, {}, value)]) for name, value in names.items()]

    totals = samples.Totals()
    for process, lost in enumerate((2, 3, 4)):
        totals.set(process, found(lost, 10))
    for process in (0, 1):
        totals.retire(process)
    metrics = {metric.name: metric.samples[0].value for metric in totals.collect([])}
    assert metrics == {"inferctl_outbox_dropped_events": 9, "inferctl_outbox_events": 10}
