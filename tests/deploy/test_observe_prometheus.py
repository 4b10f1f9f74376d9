"""A real Prometheus scrapes a server: the queries of the dashboard find its series."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from inferctl.deploy.observe.dashboard import dashboard
from inferctl.deploy.observe.watched import Watched, WatchedFlavor
from inferctl.manifests import metric_names
from tests.processes import CLIENT, ServerProcess, until

# In one worker, one test after the other: the queries look back for 30 s.
pytestmark = pytest.mark.xdist_group("prometheus")
WATCHED = Watched("embed", "inference", "embed", (WatchedFlavor("embed-l4", 60, 10),), cache=True, metering=True)
LABELS = {"namespace": "inference", "service": "embed", "pod": "embed-l4-7d9f8c6b5-abcde", "inferctl_io_flavor": "l4"}


@pytest.fixture(scope="module")
def server(
    minilm: Path, tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]
) -> ServerProcess:
    folder = tmp_path_factory.mktemp("scraped")
    spec = {
        "name": "embed",
        "model": {"source": str(minilm)},
        "slo": {"p99_ms": 1000},
        "cache": {"size": "16MiB"},
        "metering": {"mode": "on", "data": str(folder / "metering")},
    }
    (folder / "inferctl.yaml").write_text(json.dumps(spec))
    return serve_module("--spec", str(folder / "inferctl.yaml"), "--engine", "echo", place=folder)


@pytest.fixture(scope="module")
def prometheus(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that scrapes the server each second."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus not found; `apt-get install prometheus` installs it")
    folder = tmp_path_factory.mktemp("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    scrape = {
        "job_name": "embed",
        "scrape_interval": "1s",
        "scrape_timeout": "1s",
        "static_configs": [{"targets": [server.url.removeprefix("http://")], "labels": LABELS}],
    }
    (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
    command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        until(lambda: ready(address) or process.poll() is not None, 60)
        assert process.poll() is None, (folder / "log").read_text()
        load(server)
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


def ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def load(server: ServerProcess) -> None:
    """Send requests of all kinds for some scrapes."""
    for number in range(120):  # the fitted capacity needs 100 batches
        server.embed(input=[[5 + number % 3, number + 20], [6]])
        CLIENT.post(f"{server.url}/v1/embeddings", json={"input": [5]}, headers={"x-priority": "bulk"})
        time.sleep(0.05)


def values(prometheus: str, expression: str) -> list[float]:
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression})
    assert answer.status_code == 200, answer.text
    return [float(sample["value"][1]) for sample in answer.json()["data"]["result"]]


def test_each_query_about_the_server_finds_its_series(prometheus: str) -> None:
    rate = "30s"
    until(lambda: values(prometheus, f"rate(inferctl_requests_total[{rate}])"), 30)  # two scrapes, on a busy machine
    asked = 0
    for panel in dashboard(WATCHED)["panels"]:
        for query in panel.get("targets", ()):
            if metric_names.used(query["expr"]) <= metric_names.SERVER and "rejected_total" not in query["expr"]:
                asked += 1
                assert values(prometheus, query["expr"].replace("$__rate_interval", rate)), query
    assert asked >= 20
