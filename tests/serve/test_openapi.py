"""Schemathesis with the server's own OpenAPI document: valid requests succeed, invalid ones are rejected."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import ServerProcess, execute, until
from tests.reading.test_outputs import bge, converted_bge
from tests.serve.test_classify_api import server as classifier
from tests.serve.test_rerank_api import Serve
from tests.serve.test_rerank_api import server as reranker

__all__ = ["bge", "classifier", "converted_bge", "reranker"]  # fixtures


@pytest.fixture(scope="module")
def dense(tiny: Callable[..., Path], serve_module: Serve) -> ServerProcess:
    """A small model: schemathesis sends the longest lists of texts that the document allows."""
    return serve_module("--model", str(tiny("bert", "mean_tokens")), "--precision", "fp32")


@pytest.fixture(scope="module")
def outputs(converted_bge: Path, serve_module: Serve) -> ServerProcess:
    return serve_module("--model", str(converted_bge), "--precision", "fp32")


def answers(server: ServerProcess) -> dict[str, float]:
    """Return the number of responses of the task's endpoints by status."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {s.labels["status"]: s.value for s in samples if s.name == "inferctl_requests_total"}


@pytest.mark.parametrize(
    ("fixture", "options", "examples", "operations"),
    [
        ("dense", (), 20, "20 selected / 20"),
        # Of the others, an answer has the same form with and without further outputs.
        ("outputs", ("--include-path-regex", "(embeddings|sparse|rerank|tokenize)$"), 20, "10 selected / 26"),
        ("classifier", (), 20, "14 selected / 14"),
        ("reranker", ("--exclude-path-regex", "score$"), 20, "16 selected / 18"),
        # A schema cannot say that two lists have the same length.
        (
            "reranker",
            ("--include-path-regex", "score$", "--exclude-checks", "positive_data_acceptance"),
            20,
            "2 selected / 18",
        ),
        pytest.param("dense", (), 1000, "20 selected / 20", marks=pytest.mark.slow_measurement),
    ],
)
def test_schemathesis_finds_no_failures(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    fixture: str,
    options: tuple[str, ...],
    examples: int,
    operations: str,
) -> None:
    server: ServerProcess = request.getfixturevalue(fixture)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
    # A schema cannot say which spaces a body asks for.
    expected = "['2xx', '401', '403', '404', '409', '412', '5xx']"
    (tmp_path / "schemathesis.toml").write_text(f"[checks.positive_data_acceptance]\nexpected-statuses = {expected}\n")
    bounds = f"--seed 1 --max-examples {examples} --request-timeout 60 --generation-database none".split()
    done = execute(*command, *bounds, *options, cwd=tmp_path, code=0)
    assert f"{operations} total" in done.stdout
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated
    assert int(generated[1]) > 8 * examples / 2
    until(lambda: server.get("/readyz").status_code == 200)
    statuses = answers(server)
    assert statuses["200"] > 0
    assert statuses["400"] > 0
    assert not [status for status in statuses if status.startswith("5")], statuses
