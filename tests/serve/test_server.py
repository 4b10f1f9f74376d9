"""The whole server with the echo engine: HTTP, queue, engine process, signals. Only the model is not real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inferctl.serve.engines.echo import FAILING_TOKEN, NON_FINITE_TOKEN, SLOW_SECONDS, SLOW_TOKEN
from tests.processes import CLIENT, ServerProcess, several, until

Serve = Callable[..., ServerProcess]


def vector(tokens: list[int]) -> list[float]:
    raw = [sum(tokens), len(tokens), 1.0]
    norm = sum(x * x for x in raw) ** 0.5
    return [x / norm for x in raw] + [0.0] * 5


def test_every_input_gets_its_own_vector_in_order(echo: ServerProcess) -> None:
    rows = [[100 + i] * (1 + i % 7) for i in range(200)]
    answer = echo.embed(input=rows, dimensions=8).json()  # those of the model
    assert [entry["index"] for entry in answer["data"]] == list(range(200))
    for row, entry in zip(rows, answer["data"], strict=True):
        assert entry["embedding"] == pytest.approx(vector(row), abs=1e-6)
    assert answer["usage"]["total_tokens"] == sum(map(len, rows))
    assert answer["model"] == "echo"


def test_responses_have_the_times_and_the_request_id(echo: ServerProcess) -> None:
    answer = echo.post("/v1/embeddings", {"input": [5, 6]}, x_request_id="mine-1")
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-inferctl-tokens"] == "2"
    for phase in ("queue", "tokenize", "inference"):
        assert float(answer.headers[f"x-inferctl-{phase}-ms"]) >= 0
    assert echo.embed(input="a").headers["x-request-id"] != echo.embed(input="a").headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"input": "a", "model": "other"}, 404, "model_not_found"),
        ({"input": "a", "model": "", "dimensions": 4}, 400, "invalid_dimensions"),
        ({"input": "a", "dimensions": 9}, 400, "invalid_dimensions"),
        ({"input": [[5], [30522]]}, 400, "invalid_token"),
        ({"input": "word " * 400, "truncate": False}, 400, "context_length_exceeded"),
        ({"input": [5] * 400, "truncate": False}, 400, "context_length_exceeded"),
        ({"input": [NON_FINITE_TOKEN]}, 500, "non_finite"),
        ({"input": [FAILING_TOKEN]}, 500, "engine_failed"),
    ],
)
def test_errors_use_the_envelope(echo: ServerProcess, body: dict[str, object], status: int, code: str) -> None:
    answer = echo.embed(**body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_long_inputs_are_truncated_and_only_processed_tokens_count(echo: ServerProcess) -> None:
    assert echo.embed(input="word " * 400).json()["usage"]["total_tokens"] == 256
    assert echo.embed(input=[5] * 400).json()["usage"]["total_tokens"] == 256
    before = echo.metric("inferctl_inputs_truncated_total")
    echo.embed(input=["word " * 400, "short", "word " * 400])
    echo.embed(input=[[5] * 257, [5] * 256])
    assert echo.metric("inferctl_inputs_truncated_total") == before + 3


def test_a_full_queue_responds_with_429_and_retry_after(echo: ServerProcess) -> None:
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda _: echo.embed(input=[SLOW_TOKEN] + [5] * 30), range(8)))
    assert {answer.status_code for answer in answers} == {200, 429}
    rejected = next(answer for answer in answers if answer.status_code == 429)
    assert int(rejected.headers["retry-after"]) >= 1
    assert rejected.json()["error"]["code"] == "queue_full"
    assert echo.metric("inferctl_rejected_total", reason="queue_full") >= 1
    assert echo.embed(input=[5]).status_code == 200


def test_probes_metrics_and_descriptions(echo: ServerProcess) -> None:
    assert echo.get("/livez").status_code == 200
    assert echo.get("/readyz").status_code == echo.get("/health").status_code == 200
    root = echo.get("/").json()
    assert (root["name"], root["task"], root["phase"]) == ("echo", "embed", "ready")
    assert "/v1/embeddings" in root["endpoints"]
    assert set(root["endpoints"]) <= echo.get("/openapi.json").json()["paths"].keys()
    for name in ("documentation", "openapi", "info", "health"):
        assert echo.get(root[name]).status_code == 200
    assert CLIENT.head(echo.url).status_code == 200
    assert echo.get("/v1/models").json()["data"][0]["id"] == "echo"
    assert echo.get("/v1/models/echo").json()["id"] == "echo"
    assert echo.get("/v1/models/other").status_code == 404
    echo.embed(input=[5, 6])
    assert echo.metric("inferctl_requests_total", endpoint="embeddings", status="200") >= 1
    info = echo.get("/info").json()
    assert {"name", "inferctl", "model", "precision", "attention", "fidelity", "device", "versions", "limits"} <= set(
        info
    )
    assert info["limits"]["max_queue_tokens"] == 64
    page = echo.get("/docs").text
    assert "/v1/embeddings" in page
    assert "<script" not in page
    assert "http" not in page.replace(echo.url, "")


def test_without_an_engine_the_server_is_live_but_not_ready(echo: ServerProcess) -> None:
    seen: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.add(echo.get("/readyz").status_code)

    watcher = threading.Thread(target=watch)
    watcher.start()
    os.kill(echo.engine_pid(), signal.SIGKILL)
    until(lambda: 503 in seen)
    assert echo.get("/livez").status_code == 200
    until(lambda: echo.metric("inferctl_engine_up") == 1)
    done.set()
    watcher.join()
    echo.wait_ready()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_drain_that_exceeds_its_timeout_exits_1(serve: Serve, minilm: Path, processes: str) -> None:
    settings = {"INFERCTL_SERVE_GRACE_SECONDS": "0", "INFERCTL_SERVE_DRAIN_SECONDS": "1"}
    server = serve("--model", str(minilm), "--engine", "echo", "--api-processes", processes, **settings)
    with ThreadPoolExecutor(3) as pool:
        lost = [pool.submit(server.embed, input=[[SLOW_TOKEN, number]] * 20) for number in range(1, 4)]
        until(lambda: server.metric("inferctl_requests_in_flight") == 3)
        server.process.send_signal(signal.SIGTERM)
        # The engine does not complete its batch.
        assert server.process.wait(timeout=10 * SLOW_SECONDS) == 1
        errors = [(each.result().status_code, each.result().json()["error"]["code"]) for each in lost]
    assert errors == [(503, "stopped")] * 3
    assert "stopped after 1 s; requests without a response: 3" in server.log.read_text()


def test_what_the_machine_does_not_have_is_an_error(minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases: list[tuple[list[str], int, str]] = [
            (["--announce", "nowhere/ready.json"], 2, "error: nowhere/ready.json cannot be written"),
            (["--announce", "folder"], 2, "error: folder cannot be written"),
            (["--host", "no.such.host.invalid"], 3, "cannot listen on no.such.host.invalid:0"),
            (["--host", "192.0.2.1"], 3, "cannot assign requested address"),
            (["--model", "./nothing"], 2, "error: model folder ./nothing not found"),
            (["--engine", "encoder", "--device", "cuda"], 3, "error: no usable CUDA GPU found"),
            (["--port", port, "--announce", "ready.json"], 3, f"listen on 127.0.0.1:{port}: address already in use"),
        ]
        common = ["serve", "--model", str(minilm), "--engine", "echo", "--port", "0"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        found = several([[*common, *options] for options, *_ in cases], cwd=tmp_path, env=environment)
    for done, (options, code, said) in zip(found, cases, strict=True):
        assert (done.returncode, done.stdout) == (code, "")
        assert said in done.stderr
        for option in ("--host", "--port"):
            assert (f"hint: `{option} " in done.stderr) == (option in options)
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "ready.json").exists()


def test_the_api_process_imports_no_package_of_engines_or_of_the_ledger() -> None:
    code = (
        "import sys\n"
        "from inferctl.serve import encoder_server, relay_process, start\n"
        "from inferctl.serve.observe import metering\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    large = {"torch", "transformers", "fastapi", "sqlalchemy", "alembic", "psycopg", "nats"}
    assert "inferctl.serve.start" in loaded and not large & set(loaded)
