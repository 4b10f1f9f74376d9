"""Run the scripts that test the benchmark itself on a small scale, and check ratios that hold on a busy machine too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_samples import HARNESS

pytestmark = pytest.mark.slow


def figures(tmp_path: Path, script: str, *options: str) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(HARNESS / script), *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert file.is_file(), done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    # The script's own limits are for a quiet machine. Its exit code must match its result.
    assert done.returncode == (0 if found.get("passed", True) else 1), done.stderr
    return found


def test_percentiles_match_the_server(tmp_path: Path) -> None:
    run = figures(tmp_path, "accuracy.py", "--seconds", "5", "--rate", "80")["runs"][0]
    assert run["requests"] > 300
    assert (run["failed"], run["not_logged"]) == (0, 0)
    # Client and network only add time to a request. So each percentile exceeds that of the server by an amount between
    # the least and the most that they added to any request.
    least, most = run["added_ms"]["least"] - 0.001, run["added_ms"]["most"] + 0.001
    assert least > 0
    for row in run["percentiles"]:
        assert least <= row["inferctl_ms"] - row["truth_ms"] <= most
