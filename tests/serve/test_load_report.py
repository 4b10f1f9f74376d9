"""The load report of a server: what it says, on a virtual clock and on a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from inferctl.serve.edge.load_report import LoadReport
from inferctl.serve.edge.request_context import UsageEvent
from tests.processes import CLIENT, ServerProcess
from tests.serve.test_generation import Start, llama, start  # noqa: F401  # fixtures

HEADER = "endpoint-load-metrics"


def read(line: str) -> tuple[float, float]:
    """Return utilization and requests/s of a report in the format that Envoy reads."""
    kind, _, content = line.partition(" ")
    assert kind == "JSON"
    found = json.loads(content)
    assert found.keys() == {"application_utilization", "rps_fractional"}
    return found["application_utilization"], found["rps_fractional"]


def of(report: LoadReport) -> tuple[float, float]:
    name, _, value = report.line().decode().partition(": ")
    assert name == HEADER
    assert value.endswith("\r\n")
    return read(value)


def test_the_quotient_of_rate_and_utilization_is_what_the_server_could_do() -> None:
    now, waiting = 0.0, 0.0
    report = LoadReport(lambda: 2, lambda: waiting, clock=lambda: now)
    assert of(report) == (0.01, 0.0)
    for _ in range(400):  # 40 requests/s of 20 ms on two slots, for 10 s
        now += 0.025
        report.record(UsageEvent("", "", 200, engine_seconds=0.02))
        report.record(UsageEvent("", "", 429))
    utilization, rate = of(report)
    assert utilization == pytest.approx(0.4, rel=0.1)
    assert rate / utilization == pytest.approx(100, rel=0.1)
    waiting, now = 0.5, now + 0.2
    assert of(report)[0] == pytest.approx(0.5 + 0.4 * 0.9, rel=0.1)
    waiting, now = 0.0, now + 60
    assert of(report) == (0.01, 0.0)


def test_a_server_reports_only_if_it_is_asked_to(
    serve: Callable[..., ServerProcess], minilm: Path, monkeypatch: pytest.MonkeyPatch, echo: ServerProcess
) -> None:
    assert HEADER not in echo.embed(input="hello").headers
    monkeypatch.setenv("INFERCTL_SERVE_LOAD_REPORTS", "true")
    server = serve("--model", str(minilm), "--engine", "echo", "--name", "echo")
    for response in (server.embed(input="hello"), server.embed(input=""), server.get("/v1/models")):
        read(response.headers[HEADER])
    assert HEADER not in server.get("/readyz").headers


def test_a_generator_reports_its_requests_in_flight(start: Start) -> None:  # noqa: F811
    server = start(INFERCTL_SERVE_LOAD_REPORTS="true", INFERCTL_SERVE_MAX_SEQUENCES="4")
    body = {"model": "m", "messages": [{"role": "user", "content": "ok"}]}
    response = CLIENT.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.status_code == 200
    utilization, _ = read(response.headers[HEADER])
    assert utilization >= 0.25, "one of four sequences is in flight"
    limits = Path(f"/proc/{server.vllm_pid()}/limits").read_text()
    assert re.search(r"Max core file size +(1 +1|0 +0) ", limits), "vLLM writes no core file either"
