"""Requests while engines crash, hang, run out of memory or return NaN. The server is real, the model is not."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from inferctl.core.errors import EXIT_INTERRUPTED
from inferctl.serve.engine_process.engine_main import EXIT_BROKEN_CONTEXT
from inferctl.serve.engines.echo import (
    CORRUPTING_TOKEN,
    CRASHING_TOKEN,
    LARGE_TOKEN,
    NON_FINITE_TOKEN,
    SLOW_TOKEN,
)
from tests.processes import ServerProcess, inferctl, until

Serve = Callable[..., ServerProcess]


@pytest.fixture
def start(serve: Serve, minilm: Path) -> Serve:
    return lambda *more, **settings: serve("--model", str(minilm), "--engine", "echo", *more, **settings)


@pytest.fixture(scope="module")
def shared(minilm: Path, serve_module: Serve) -> ServerProcess:
    """A server with small batches, whose engine tests may end."""
    return serve_module("--model", str(minilm), "--engine", "echo", "--name", "echo", "--max-batch-tokens", "64")


@pytest.fixture
def server(shared: ServerProcess) -> ServerProcess:
    """The shared server, ready."""
    shared.wait_ready()
    return shared


def embed_all(server: ServerProcess, rows: list[list[int]]) -> list[int]:
    """Send one request per row while the engine is busy for two seconds, and return the statuses."""
    with ThreadPoolExecutor(len(rows) + 1) as pool:
        busy = pool.submit(server.embed, input=[[SLOW_TOKEN]] * 4)
        until(lambda: server.metric("inferctl_requests_in_flight") == 1)
        waiting = [pool.submit(server.embed, input=row) for row in rows]
        statuses = [future.result().status_code for future in waiting]
        assert busy.result().status_code == 200
    return statuses


def test_only_the_request_that_crashes_engines_is_rejected(server: ServerProcess) -> None:
    deaths = server.metric("inferctl_engine_deaths_total")
    # Others share the batch of the crashing request, and more than one full batch is queued behind it.
    rows = [[100 + i] * 8 for i in range(4)] + [[CRASHING_TOKEN] * 8] + [[200 + i] * 8 for i in range(16)]
    assert embed_all(server, rows) == [503 if row[0] == CRASHING_TOKEN else 200 for row in rows]
    assert server.metric("inferctl_engine_deaths_total") <= deaths + 3
    assert server.get("/livez").status_code == 200


def test_five_failed_starts_make_livez_fail_until_an_engine_starts(start: Serve) -> None:
    server = start()
    killed: set[int] = set()

    def kill_until_livez_fails() -> bool:
        for pid in set(server.children()) - killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        return server.get("/livez").status_code == 503

    until(kill_until_livez_fails)
    # One ready engine and five starts; more if an engine was ready before it was killed.
    assert len(killed) >= 6
    assert server.get("/readyz").status_code == 503
    server.wait_ready()
    assert server.get("/livez").status_code == 200
    assert server.get("/info").json()["restarts"] == len(killed) == server.metric("inferctl_engine_restarts")


def test_a_batch_that_runs_out_of_memory_is_split_and_later_ones_are_smaller(start: Serve) -> None:
    server = start()
    before = server.get("/info").json()["limits"]["max_batch_tokens"]
    rows = [[LARGE_TOKEN] * 100, *[[100 + i] * 100 for i in range(7)]]
    assert embed_all(server, rows) == [200] * 8
    info = server.get("/info").json()
    assert info["engines"]["out_of_memory"] == server.metric("inferctl_out_of_memory_total") >= 1
    assert info["limits"]["max_batch_tokens"] == server.metric("inferctl_batch_limit_tokens") < before
    assert server.metric("inferctl_engine_deaths_total") == 0


def test_an_engine_whose_cuda_context_is_broken_ends_and_only_that_request_fails(server: ServerProcess) -> None:
    deaths = server.metric("inferctl_engine_deaths_total")
    rows = [[100], [101], [CORRUPTING_TOKEN], [102], [103]]
    assert embed_all(server, rows) == [200, 200, 503, 200, 200]
    server.wait_ready()
    assert server.embed(input=[5]).status_code == 200
    assert server.metric("inferctl_engine_deaths_total") == deaths + 2, "in a batch with others, then in isolation"
    log = server.log.read_text()
    assert "the CUDA context is broken" in log
    assert f"exit code {EXIT_BROKEN_CONTEXT}" in log


def test_an_input_with_nan_gets_500_and_others_in_its_batch_their_vectors(server: ServerProcess) -> None:
    assert embed_all(server, [[NON_FINITE_TOKEN], [100], [101]]) == [500, 200, 200]
    assert server.metric("inferctl_non_finite_total") == 1


@pytest.mark.parametrize("processes", ["1", "2"])
def test_requests_complete_after_a_signal_to_the_process_group(start: Serve, processes: str) -> None:
    server = start("--api-processes", processes)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.embed, input=[SLOW_TOKEN, i]) for i in range(1, 5)]
        until(lambda: server.metric("inferctl_requests_in_flight") == 4)
        os.killpg(server.process.pid, signal.SIGTERM)
        assert [future.result().status_code for future in waiting] == [200] * 4
    assert server.process.wait(timeout=60) == 0
    assert "Traceback" not in server.log.read_text()


def test_during_the_grace_period_readyz_fails_and_requests_complete(start: Serve) -> None:
    server = start(INFERCTL_SERVE_GRACE_SECONDS="4")
    with httpx.Client(base_url=server.url) as client:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503)
        assert client.post("/v1/embeddings", json={"input": [5]}).status_code == 200
        assert client.get("/livez").status_code == 200
    assert server.process.wait(timeout=60) == 0


# A Python process sends itself SIGTERM when the first tokenizer thread has started, before the pool registers it.
# Without nanotoken, since the pool starts its threads only for the library tokenizers.
SIGNAL_WITHIN_A_START = """
import os, signal, sys, threading
sys.modules["nanotoken"] = None
start = threading.Thread.start
def start_and_signal(thread):
    start(thread)
    if thread.name.startswith("tokenize") and not sent:
        sent.append(thread)
        os.kill(os.getpid(), signal.SIGTERM)
sent = []
threading.Thread.start = start_and_signal
"""


def test_a_stop_while_the_server_starts_a_thread_ends_it(minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SIGNAL_WITHIN_A_START)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = ("--model", minilm, "--engine", "echo", "--port", "0")
    done = inferctl("serve", *options, env={**os.environ, "PYTHONPATH": paths}, code=0)
    assert "stopped" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("moments", [6, pytest.param(24, marks=pytest.mark.slow_measurement)])
def test_a_stop_at_any_moment_of_the_start_ends_the_server(minilm: Path, tmp_path: Path, moments: int) -> None:
    command = ("inferctl", "serve", "--model", str(minilm), "--engine", "echo", "--port", "0")

    def codes(seconds: Iterable[float]) -> Iterator[int]:
        for pause in seconds:
            server = ServerProcess.launch(tmp_path, *command)
            ready, end = server.announced, time.monotonic() + pause
            try:
                until(lambda ready=ready, end=end: time.monotonic() > end or ready.exists())
                code = server.stop()
            finally:
                server.kill()
            assert "Traceback" not in (said := server.log.read_text()), said
            yield code

    began = time.monotonic()
    assert list(codes([math.inf])) == [0]
    whole = time.monotonic() - began
    # At first the interpreter itself handles the signal. If the interrupt later reaches code that `exec` runs from text
    # (dataclasses do this at import), CPython ends `python -m` by SIGINT, although inferctl handled the exception.
    expected = {-signal.SIGTERM, -signal.SIGINT, EXIT_INTERRUPTED, 0}
    assert set(codes(whole * part / moments for part in range(moments))) <= expected


@pytest.mark.parametrize(
    ("reason", "setting", "slo_ms"), [("slo", "SLO_P99_MS", 2000), ("max_wait", "SERVE_MAX_WAIT_SECONDS", None)]
)
def test_requests_with_a_long_predicted_wait_are_rejected_with_a_retry_time(
    start: Serve, reason: str, setting: str, slo_ms: int | None
) -> None:
    server = start("--max-batch-tokens", "64", **{f"INFERCTL_{setting}": str(slo_ms or 2)})
    assert server.get("/info").json()["limits"]["slo_p99_ms"] == slo_ms
    # The server learns that such a batch takes half a second.
    assert server.embed(input=[SLOW_TOKEN] + [5] * 60).status_code == 200
    assert server.get("/info").json()["pace"]["tokens_per_s"] < 200
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: server.embed(input=[SLOW_TOKEN] + [5] * 60 + [i]), range(1, 13)))
    assert {answer.status_code for answer in answers} == {200, 429}
    rejected = [answer for answer in answers if answer.status_code == 429]
    assert {answer.json()["error"]["code"] for answer in rejected} == {reason}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in rejected)
    assert server.metric("inferctl_rejected_total", reason=reason) == len(rejected)


def test_interactive_requests_run_before_bulk_and_probes_do_not_wait(server: ServerProcess) -> None:
    with ThreadPoolExecutor(2) as pool:
        body = {"input": [[SLOW_TOKEN] * 64] * 12}
        bulk = pool.submit(server.post, "/v1/embeddings", body, x_priority="bulk")
        until(lambda: server.metric("inferctl_queue_tokens") > 0)
        assert server.get("/readyz").status_code == 200
        assert server.embed(input=[5]).status_code == 200
        assert not bulk.done()
        assert bulk.result().status_code == 200
    odd = server.post("/v1/embeddings", {"input": [5]}, x_priority="urgent")
    assert (odd.status_code, odd.json()["error"]["code"]) == (400, "invalid_priority")
