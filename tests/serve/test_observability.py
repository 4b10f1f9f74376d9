"""Metrics for Prometheus, logs as JSON, traces for an OTLP collector."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inferctl.serve.engines.echo import FAILING_TOKEN
from tests.http_servers import Handler, serving
from tests.processes import ServerProcess, python, until

Serve = Callable[..., ServerProcess]


@pytest.fixture
def start(serve: Serve, minilm: Path) -> Serve:
    return lambda *more: serve("--model", str(minilm), "--engine", "echo", *more)


def test_promtool_accepts_the_metrics(echo: ServerProcess) -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool not found; `apt-get install prometheus` installs it")
    echo.embed(input=[5])
    echo.embed(input=[FAILING_TOKEN])
    text = echo.get("/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_json_logs_have_one_object_per_line_with_the_request_id(start: Serve) -> None:
    server = start("--log", "json")
    server.post("/v1/embeddings", {"input": [5, 6]}, x_request_id="mine-7")
    server.embed(input=[FAILING_TOKEN])
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    mine, failed = (line for line in lines if line["logger"] == "inferctl.request")
    assert (mine["request_id"], mine["status"], mine["tokens"]) == ("mine-7", 200, 2)
    assert {"ms", "queue_ms", "tokenize_ms", "inference_ms"} <= set(mine)
    assert failed["status"] == 500
    # The engine logs in the same format, with its traceback in one of the lines.
    assert any(line["logger"] == "inferctl.engine" and "injected failure" in line["exception"] for line in lines)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The requests that an OTLP collector received."""
    got: list[bytes] = []

    class Collector(Handler):
        def do_POST(self) -> None:
            got.append(self.body())
            self.reply()

    with serving(Collector) as port:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        yield got


def test_traces_go_to_the_configured_endpoint_and_join_the_callers_trace(start: Serve, collector: list[bytes]) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the otel extra is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    server = start()
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "x_request_id": "mine-8"}
    assert server.post("/v1/embeddings", {"input": [5]}, **headers).status_code == 200
    assert server.stop() == 0
    until(lambda: bool(collector), 30)
    sent = [ExportTraceServiceRequest.FromString(body) for body in collector]
    spans = {s.name: s for r in sent for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans}
    assert set(spans) == {"embeddings", "tokenize", "queue", "inference"}
    whole = spans["embeddings"]
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (trace, parent)
    assert {a.key: a.value.string_value for a in whole.attributes}["inferctl.request_id"] == "mine-8"
    for name in ("tokenize", "queue", "inference"):
        assert spans[name].parent_span_id == whole.span_id
        assert whole.start_time_unix_nano <= spans[name].start_time_unix_nano <= spans[name].end_time_unix_nano
        assert spans[name].end_time_unix_nano <= whole.end_time_unix_nano


@pytest.mark.usefixtures("collector")
def test_traces_without_the_packages_are_an_error(minilm: Path, tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['opentelemetry.sdk'] = None; from inferctl.cli import main; main()"
    done = python(
        "-c", hidden, "serve", "--model", minilm, "--engine", "echo", "--port", "0", cwd=tmp_path, timeout=120, code=2
    )
    assert "in a clone of inferctl: `pip install '.[otel]'`" in done.stderr
