"""Schemathesis with the server's own OpenAPI document: valid requests succeed, invalid ones are rejected."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import ServerProcess, until

MINILM = pytest.mark.xdist_group("minilm")


def answers(server: ServerProcess) -> dict[str, float]:
    """Return the number of responses of POST /v1/embeddings by status."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {s.labels["status"]: s.value for s in samples if s.name == "inferctl_requests_total"}


@pytest.mark.parametrize(
    ("fixture", "options", "examples"),
    [
        pytest.param("minilm_server", (), 30, marks=MINILM),
        ("echo", ("--exclude-checks", "not_a_server_error"), 30),
        pytest.param("minilm_server", (), 1000, marks=[MINILM, pytest.mark.slow_measurement]),
    ],
)
def test_schemathesis_finds_no_failures(
    request: pytest.FixtureRequest, tmp_path: Path, fixture: str, options: tuple[str, ...], examples: int
) -> None:
    server: ServerProcess = request.getfixturevalue(fixture)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
    bounds = [
        "--seed",
        "1",
        "--max-examples",
        str(examples),
        "--request-timeout",
        "60",
        "--generation-database",
        "none",
    ]
    done = subprocess.run([*command, *bounds, *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout
    assert "10 selected / 10 total" in done.stdout
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated
    assert int(generated[1]) > 8 * examples / 2
    until(lambda: server.get("/readyz").status_code == 200)
    statuses = answers(server)
    assert statuses["200"] > 0
    assert statuses["400"] > 0
    if fixture == "minilm_server":
        assert not [status for status in statuses if status.startswith("5")], statuses
