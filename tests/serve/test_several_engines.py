"""Several engines under load: one is killed, hangs or dies slowly. Nothing is lost, and the server recovers."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from inferctl.serve.engine_process.engine_protocol import EngineConfig
from inferctl.serve.engine_process.pool import more_engines
from inferctl.serve.engines.echo import CLOSING_TOKEN
from tests.processes import ServerProcess, inferctl, until
from tests.serve.test_dispatcher import INFO

Serve = Callable[..., ServerProcess]
PTRACE_SEIZE = 0x4206


@dataclass
class Load:
    """Clients that send requests with a pause of `pause_s` after each.

    `wrong`: responses that are neither right nor a documented error.
    """

    server: ServerProcess
    expected: Callable[[int], tuple[Any, Any]]  # number of a request -> its input, its vector
    completed: int = 0
    pause_s: float = 0.01  # without a pause, they take all cores from the tests beside this one
    unavailable: int = 0
    wrong: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)
    _stop: threading.Event = field(default_factory=threading.Event)

    def _client(self) -> None:
        with httpx.Client(base_url=self.server.url, timeout=60) as client:
            while not self._stop.is_set():
                given, vector = self.expected(next(self._numbers))
                try:
                    response = client.post("/v1/embeddings", json={"input": given})
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                    continue
                if response.status_code == 503 and response.json()["error"]["code"] in (
                    "engine_unavailable",
                    "not_ready",
                ):
                    self.unavailable += 1
                elif response.status_code != 200:
                    self.wrong.append(response.text)
                elif not np.allclose(response.json()["data"][0]["embedding"], vector, atol=2e-3):
                    self.wrong.append(f"another vector for {given}")
                else:
                    self.completed += 1
                    self._stop.wait(self.pause_s)

    @contextmanager
    def running(self, clients: int = 8) -> Iterator[Load]:
        threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
            self.wait_for_progress()
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        assert not self.wrong, self.wrong[:3]

    def wait_for_progress(self, responses: int = 50) -> None:
        target = self.completed + responses
        until(lambda: self.completed >= target or bool(self.wrong))


def echo_row(number: int) -> tuple[list[int], list[float]]:
    row = [100 + number % 9000] * (1 + number % 40)
    vector = np.array([sum(row), len(row), 1.0] + [0.0] * 5)
    return row, list(vector / np.linalg.norm(vector))


def engines_of(server: ServerProcess) -> list[int]:
    """Return the process ids of the running engines, without zombies."""
    found = []
    for pid in server.children():
        # A killed engine can end at any moment.
        with suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(pid))
    return found


def wait_for_engines(server: ServerProcess, engines: int) -> None:
    until(lambda: server.metric("inferctl_engine_up") == engines)


@pytest.fixture(scope="module")
def shared(serve_module: Serve, minilm: Path) -> ServerProcess:
    options = ("--engine", "echo", "--engines", "3", "--hang-seconds", "1", "--max-batch-tokens", "512")
    return serve_module("--model", str(minilm), *options)


@pytest.fixture
def three(shared: ServerProcess) -> ServerProcess:
    """A server with three engines, all of them ready, which tests may kill."""
    wait_for_engines(shared, 3)
    return shared


def test_killed_engines(three: ServerProcess) -> None:
    before = three.get("/info").json()["engines"]["restarts"]
    with Load(three, echo_row).running() as load:
        for _ in range(6):
            until(lambda: three.metric("inferctl_engine_up") >= 2)
            engine = engines_of(three)[0]
            os.kill(engine, signal.SIGKILL)
            until(lambda engine=engine: engine not in engines_of(three))  # type: ignore[misc]
            load.wait_for_progress()
        wait_for_engines(three, 3)
    assert load.completed > 300
    # A request is rejected only if two engines are killed while they run it.
    assert load.unavailable <= 6
    info = three.get("/info").json()["engines"]
    assert (info["count"], info["up"], info["restarts"]) == (3, 3, before + 6)


def test_a_hung_engine(three: ServerProcess) -> None:
    hangs = three.get("/info").json()["engines"]["hangs"]
    with Load(three, echo_row).running() as load:
        load.wait_for_progress()
        os.kill(engines_of(three)[1], signal.SIGSTOP)
        until(lambda: three.get("/info").json()["engines"]["hangs"] == hangs + 1)
        wait_for_engines(three, 3)
    assert load.unavailable == 0


def test_an_engine_that_closes_its_socket_and_lives_on(three: ServerProcess) -> None:
    deaths = three.metric("inferctl_engine_deaths_total")
    with Load(three, echo_row).running() as load:
        load.wait_for_progress()
        assert three.embed(input=[CLOSING_TOKEN]).status_code == 503, "two engines, one after the other"
        until(lambda: three.metric("inferctl_engine_deaths_total") == deaths + 2)
        load.wait_for_progress(300)
        wait_for_engines(three, 3)
    assert load.unavailable == 0


@contextmanager
def zombie(pid: int) -> Iterator[None]:
    """Kill a process that stays a zombie: its parent cannot reap it while this process traces it."""
    if ctypes.CDLL(None, use_errno=True).ptrace(PTRACE_SEIZE, pid, None, None) != 0:
        pytest.skip(f"cannot trace the engine: {os.strerror(ctypes.get_errno())}")
    os.kill(pid, signal.SIGKILL)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    yield
    os.waitpid(pid, 0)


def test_an_engine_that_stays_a_zombie_does_not_keep_the_server_from_work_or_its_end(three: ServerProcess) -> None:
    """The last test of the server."""
    deaths = three.metric("inferctl_engine_deaths_total")
    with ExitStack() as stack:
        with Load(three, echo_row).running() as load:
            load.wait_for_progress()
            stack.enter_context(zombie(engines_of(three)[0]))
            until(lambda: three.metric("inferctl_engine_deaths_total") == deaths + 1, 3)
            load.wait_for_progress(300)
            wait_for_engines(three, 3)  # another process replaces it
        assert load.unavailable == 0
        three.process.send_signal(signal.SIGTERM)
        assert three.process.wait(timeout=60) == 0
    assert "Traceback" not in three.log.read_text()


@pytest.mark.parametrize(
    ("device", "gpus", "count", "expected"),
    [
        ("auto", 1, None, []),
        ("auto", 4, None, ["cuda:1", "cuda:2", "cuda:3"]),
        ("auto", 2, 4, ["cuda:1", "cuda:0", "cuda:1"]),
        ("auto", 4, 2, ["cuda:1"]),
        ("cuda", 4, 2, ["cuda:1"]),
        ("auto", 1, 2, ["auto"]),
        ("cuda:3", 1, 2, ["cuda:3"]),
    ],
)
def test_the_engines_share_the_gpus_and_the_results_of_the_first(
    device: str, gpus: int, count: int | None, expected: list[str]
) -> None:
    first = replace(INFO, device=replace(INFO.device, kind="cuda", count=gpus))
    configs = more_engines(EngineConfig(device=device), count, first)
    assert [config.device for config in configs] == expected
    assert all(config.previous_info == first.to_json() for config in configs)


def test_an_encoder_uses_the_results_of_an_equal_device_and_its_share_of_the_cores(minilm: Path) -> None:
    from inferctl.core import cgroup
    from inferctl.serve.engines.encoder import EncoderEngine

    config = EngineConfig(model=str(minilm), precision="fp32", device="cpu", engines=cgroup.cores())
    first = EncoderEngine(config).load()
    assert (first.parallel, first.batch_tokens) == (1, 1024), "the limits of one core"
    # Another GPU of the same machine differs in `count`, because its name is cuda:1 and not auto.
    earlier = replace(first, check="of an earlier engine", device=replace(first.device, count=8))
    assert EncoderEngine(replace(config, previous_info=earlier.to_json())).load().check == "of an earlier engine"


# A bug of the API process: it fails when the second engine is ready.
SUPERVISOR_BUG = """
from inferctl.serve.engine_process.supervisor import EngineSupervisor
engine_ready, calls = EngineSupervisor._engine_ready, []
def failing(self, info):
    calls.append(info)
    if len(calls) == 2:
        raise RuntimeError("injected bug")
    engine_ready(self, info)
EngineSupervisor._engine_ready = failing
"""


def test_an_unexpected_error_of_any_supervisor_ends_the_server(minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SUPERVISOR_BUG)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = ("--model", minilm, "--port", "0", "--engine", "echo", "--engines", "2")
    done = inferctl("serve", *options, env={**os.environ, "PYTHONPATH": paths}, code=1)
    assert "RuntimeError: injected bug" in done.stderr
