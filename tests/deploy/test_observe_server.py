"""Every metric of dashboards and alerts exists in `/metrics` of running servers, and no server has others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from inferctl.config.spec_types import CACHED
from inferctl.manifests import metric_names
from tests.models.model_folders import stand_in
from tests.processes import ServerProcess
from tests.serve.test_generation import launch

_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}


def exposed(server: ServerProcess) -> set[str]:
    """Return the names of all series that a server can have, also of those without a label so far."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {family.name + suffix for family in families for suffix in _SUFFIXES.get(family.type, ("",))}


def own(server: ServerProcess) -> set[str]:
    found = {name for name in exposed(server) if name.startswith("inferctl_")}
    return {name for name in found if not name.endswith("_created")}  # the client library adds them


def spec(folder: Path, model: Path, **sections: object) -> Path:
    file = folder / "inferctl.yaml"
    metering = {"mode": "on", "data": str(folder / "metering")}
    file.write_text(json.dumps({"name": "m", "model": {"source": str(model)}, "metering": metering, **sections}))
    return file


@pytest.mark.parametrize(("task", "labels"), [("embed", 0), ("rerank", 1), ("classify", 8)])
def test_servers_of_encoders_have_the_names(
    task: str, labels: int, minilm: Path, tmp_path: Path, serve: Callable[..., ServerProcess]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(minilm, model, ignore=shutil.ignore_patterns("modules.json") if labels else None)
    if labels:
        config = json.loads((minilm / "config.json").read_text())
        config |= {"architectures": ["BertForSequenceClassification"], "id2label": {n: str(n) for n in range(labels)}}
        (model / "config.json").write_text(json.dumps(config))
    file = spec(tmp_path, model, cache={"size": "16MiB"}, slo={"p99_ms": 1000})
    server = serve("--spec", str(file), "--engine", "echo")
    assert server.get("/info").json()["task"] == task
    expected = metric_names.SERVER - (set() if task in CACHED else {n for n in metric_names.SERVER if "_cache_" in n})
    assert expected <= own(server) <= metric_names.SERVER


def test_a_server_of_generation_has_the_names(tmp_path: Path) -> None:
    model = stand_in(tmp_path / "llama")
    file = spec(tmp_path, model, slo={"ttft_ms": 500})
    server = launch(tmp_path, model, "--spec", str(file))
    try:
        server.wait_announced()
        assert own(server) == metric_names.REQUESTS | metric_names.OUTBOX
    finally:
        server.process.kill()
        server.process.wait()
