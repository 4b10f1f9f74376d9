"""The server and the reference implementation with the real model."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.core.errors import UsageError
from inferctl.serve import reference
from tests.processes import ServerProcess


def test_info_describes_the_engine(minilm_server: ServerProcess, minilm_reference: dict[str, Any]) -> None:
    info = minilm_server.get("/info").json()
    assert info["model"]["sha256"] == minilm_reference["model_sha256"]
    assert (info["model"]["dimensions"], info["model"]["max_tokens"]) == (384, 256)
    assert (info["model"]["pooling"], info["model"]["normalize"]) == ("mean", True)
    assert (info["precision"]["effective"], info["precision"]["level"]) == ("fp32", "native")
    assert info["attention"] == "packed"
    assert info["fidelity"]["cosine_min"] > 0.99999
    assert info["device"]["hardware"] == "cpu"
    assert info["ready_seconds"] > 0


def test_bulk_requests_run_on_threads_that_use_idle_time_with_equal_results(minilm_server: ServerProcess) -> None:
    body = {"input": [f"text number {i} about rivers" for i in range(200)]}
    found = [minilm_server.post("/v1/embeddings", body, x_priority=each) for each in ("bulk", "interactive")]
    rows = [answer.json()["data"] for answer in found]
    np.testing.assert_allclose(*([row["embedding"] for row in each] for each in rows), atol=2e-6)
    threads = Path(f"/proc/{minilm_server.engine_pid()}/task").iterdir()
    policies = [os.sched_getscheduler(int(thread.name)) for thread in threads]
    assert 0 < policies.count(os.SCHED_IDLE) <= os.cpu_count() < len(policies)


@pytest.mark.parametrize("stdin", ["", "{}", "[]", "[1]", '[["a"]]', '["a", ["b", "c"]]', '[["a", "b"]]'])
def test_the_reference_accepts_only_a_list_of_texts(minilm: Path, monkeypatch: pytest.MonkeyPatch, stdin: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reference", str(minilm)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(UsageError) as error:
        reference.main()
    assert error.value.hint


def test_the_engine_process_does_not_load_unused_libraries(minilm_server: ServerProcess) -> None:
    """The development tools include them, and transformers would import them."""
    assert importlib.util.find_spec("sklearn")
    assert importlib.util.find_spec("scipy")
    mapped = Path(f"/proc/{minilm_server.engine_pid()}/maps").read_text()
    assert "/torch/" in mapped
    assert "/sklearn/" not in mapped
    assert "/scipy/" not in mapped
