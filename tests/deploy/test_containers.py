"""Containers of rendered Deployments on a real Docker Engine: they become ready, and drain without lost requests."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from inferctl.config.spec import Spec
from inferctl.deploy import layout
from inferctl.receipts import receipt
from inferctl.receipts.capacity import served_rate
from tests.deploy import plans
from tests.deploy.conftest import Objects, kustomize, objects, write
from tests.deploy.containers import (
    Network,
    assert_constrained,
    docker,
    folders,
    image_volumes,
    secret_with_key,
    start,
)
from tests.deploy.test_layout import named, pod_of
from tests.processes import execute, inferctl
from tests.processes import start as start_on_host

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = "localhost:5000/deploy/embed"
CLUSTER = [{"name": "here", "kubernetes": "1.35"}]
PORT = 8081


def run(*arguments: str | Path) -> str:
    return inferctl(*arguments, code=0, timeout=None).stdout.strip()


@pytest.fixture(scope="module")
def spec_file(base_image: str, wheels: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec as of a model team: mounted weights, keys, usage events. Its flavors have GPUs."""
    file = tmp_path_factory.mktemp("deploy") / "inferctl.yaml"
    spec = {
        "name": "embed",
        "model": {"source": str(minilm)},
        # In fp32, because the containers run on this CPU, where bf16 may be emulated.
        "serve": {"port": PORT, "max_batch_tokens": 4096, "drain_seconds": 20, "precision": "fp32"},
        "image": {"repository": REPOSITORY, "base": "cpu", "base_image": base_image, "wheels": str(wheels)},
        "access": {"keys": "keys.json"},
        "metering": {"mode": "on"},
    }
    file.write_text(yaml.safe_dump(spec))
    return file


@pytest.fixture(scope="module")
def image(spec_file: Path) -> Iterator[str]:
    built = json.loads(run("build", "--spec", spec_file, "--push", "--network", "host", "--no-verify", "--json"))
    yield str(built["pushed"])
    images = execute("docker", "images", "--quiet", "--no-trunc", REPOSITORY)
    subprocess.run(["docker", "image", "rm", "--force", *set(images.stdout.split())], capture_output=True, check=False)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the Secret with the key file, and a key."""
    folder = tmp_path_factory.mktemp("keys")
    return folder, secret_with_key(folder)


@pytest.fixture
def rendered(image: str, spec_file: Path, tmp_path: Path) -> Objects:
    """The objects of a cluster: three flavors of one model with keys and usage events."""
    return render(image, spec_file, tmp_path)


def render(image: str, spec_file: Path, folder: Path, kind: str = "overlays", **deploy: Any) -> Objects:
    spec = Spec.model_validate(with_deploy(image, spec_file, **deploy))
    rendered_files = layout.files(plans.plan(spec, clusters=CLUSTER))
    built = kustomize(write(rendered_files, folder / "manifests") / kind / "here")
    return [each for each in yaml.safe_load_all(built) if each]


def with_deploy(image: str, spec_file: Path, **deploy: Any) -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load(spec_file.read_text())
    hardware = [("a100-half", "a100-40gb-mig-3g.20gb"), ("l4", "l4"), ("t4", "t4")]
    spec["deploy"] = {
        "flavors": [
            {"name": name, "hardware": key, "image": image, "tokens_per_second": 1000} for name, key in hardware
        ],
        "traffic": {"base_rps": 10, "peak_rps": 100, "tokens_per_request": 60},
        "weights": {"pvc": "weights"},
        "keys_secret": "inferctl-keys",
        "ledger_secret": "inferctl-ledger",
        "tools_image": f"registry.example.com/tools{plans.DIGEST}",
        **deploy,
    }
    return spec


@pytest.fixture
def network(tools: str) -> Iterator[Network]:
    found = Network(tools)
    yield found
    found.remove()


class Load:
    """Clients that send requests until `stop`, each shortly after its last one is answered."""

    def __init__(self, network: Network, url: str, key: str, clients: int = 6) -> None:
        self.network, self.url, self.headers = network, url, {"authorization": f"Bearer {key}"}
        self.outcomes: list[object] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _client(self, number: int) -> None:
        self.network.enter()
        body = {"input": [f"client {number} sends text {index} " * 4 for index in range(2)]}
        with httpx.Client(headers=self.headers, timeout=60) as client:
            while not self._stopping.is_set():
                try:
                    response = client.post(f"{self.url}/v1/embeddings", json=body)
                    self.outcomes.append(response.status_code)
                except httpx.HTTPError as error:
                    self.outcomes.append(repr(error))
                self._stopping.wait(0.1)  # leaves a part of the cores to other tests

    def stop(self) -> list[object]:
        """Send no new requests, wait for the last responses, and return all outcomes."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        return self.outcomes


def test_a_server_becomes_ready_and_drains_without_losing_a_request(
    rendered: Objects,
    network: Network,
    keys: tuple[Path, str],
    tools: str,
    minilm: Path,
    tmp_path: Path,
) -> None:
    pod = pod_of(rendered, "embed-a100-half")
    folder, key = keys
    volumes = {**folders(pod, tmp_path / "volumes"), "model": minilm, "keys": folder}
    (sidecar,) = pod["initContainers"]
    secrets = {"inferctl-ledger/url": "sqlite:////metering/ledger.sqlite"}
    relay = start(network, pod, {**sidecar, "image": tools}, volumes, secrets)
    server = start(network, pod, pod["containers"][0], volumes)
    try:
        server.wait_started()
        assert server.probe("readinessProbe")
        assert server.probe("livenessProbe")
        assert_constrained(server)
        embeddings = f"{server.url()}/v1/embeddings"
        assert network.run(lambda: httpx.post(embeddings, json={"input": "a"})).status_code == 401
        # Prometheus has no key.
        assert network.run(lambda: httpx.get(f"{server.url()}/metrics")).status_code == 200
        load = Load(network, server.url(), key)
        time.sleep(3)
        ending = threading.Thread(target=server.terminate)
        ending.start()
        # Routers need a part of the preStop hook to notice. Until then, requests arrive.
        time.sleep(server.container["lifecycle"]["preStop"]["sleep"]["seconds"] - 1)
        outcomes = load.stop()
        ending.join()
        assert len(outcomes) > 20
        assert set(outcomes) == {200}, outcomes
        state = server.state()
        assert (state["ExitCode"], state["OOMKilled"], state["Running"]) == (0, False, False)
        # The sidecar ends after the server, so it stores the last events.
        docker("stop", "--time", str(pod["terminationGracePeriodSeconds"]), relay.name)
        assert relay.state()["ExitCode"] == 0, relay.logs()
        ledger = f"sqlite:///{volumes['metering']}/ledger.sqlite"
        rows = json.loads(run("usage", "--by", "key,status", "--ledger", ledger, "--format", "json"))["rows"]
        assert sum(row["requests"] for row in rows if row["status"] == 200) == len(outcomes), rows
    finally:
        server.remove()
        relay.remove()


@pytest.fixture(scope="module")
def mounting(image: str, spec_file: Path, minilm: Path) -> dict[str, Any]:
    """The pod that `inferctl deploy` writes for a model image."""
    source = run("model", "push", minilm, f"{REPOSITORY}-model:v1")
    flavor = {"hardware": "cpu", "image": image, "tokens_per_second": 1000}
    spec = {**with_deploy(image, spec_file, flavors=[flavor], weights={}), "model": {"source": source}}
    file = spec_file.with_name("mounting.yaml")
    file.write_text(yaml.safe_dump(spec))
    run("deploy", "--spec", file, "--output", file.with_suffix(""))
    pod = pod_of(objects(file.with_suffix("") / "overlays" / "default"), "embed-cpu")
    assert [f"oci://{each['image']['reference']}" for each in pod["volumes"] if "image" in each] == [source]
    return pod


def test_a_server_with_a_model_image_as_a_volume_returns_the_embeddings_of_the_folder(
    mounting: dict[str, Any], keys: tuple[Path, str], base_image: str, minilm: Path, tmp_path: Path
) -> None:
    folder, key = keys
    volumes = {**folders(mounting, tmp_path / "empty"), **image_volumes(mounting, tmp_path / "images"), "keys": folder}
    network = Network(base_image)
    server = start(network, mounting, mounting["containers"][0], volumes)
    host = None
    try:
        host = start_on_host(tmp_path, "--model", str(minilm), "--precision", "fp32")
        server.wait_started()
        assert server.probe("readinessProbe")
        assert_constrained(server)
        assert subprocess.run(["docker", "exec", server.name, "touch", "/model/file"], capture_output=True).returncode
        url, headers = f"{server.url()}/v1/embeddings", {"authorization": f"Bearer {key}"}
        body = {"input": ["the cat sat on the mat", "Quarterly revenue grew by nine percent.", "naïve café ☕"]}
        of_image = network.run(lambda: httpx.post(url, json=body, headers=headers, timeout=60))
        answers = (of_image, host.embed(**body))
        mounted, local = (np.array([each["embedding"] for each in answer.json()["data"]]) for answer in answers)
        # With equal weights, precision and code, only the order of additions can differ.
        assert np.min(np.sum(mounted * local, axis=1)) > 0.9999
    finally:
        server.remove()
        network.remove()
        if host:
            host.kill()


def test_a_bench_job_measures_its_server_and_prints_the_receipts(
    image: str, spec_file: Path, network: Network, tools: str, minilm: Path, tmp_path: Path
) -> None:
    flavor = {"hardware": "cpu", "image": image}
    flavors = [{**flavor, "tokens_per_second": 1000}]
    built = render(image, spec_file, tmp_path, "bench", bench=True, flavors=flavors)
    pod = named(built, "Job", "bench-embed-cpu")["spec"]["template"]["spec"]
    volumes = {**folders(pod, tmp_path / "volumes"), "model": minilm}
    server = start(network, pod, pod["initContainers"][0], volumes)
    bench = None
    try:
        server.wait_started()
        assert pod["shareProcessNamespace"]
        shared = ("--pid", f"container:{server.name}")
        container = pod["containers"][0]
        shell, option, script = container["command"]
        assert "--users 16 --duration 60" in script
        short = [shell, option, script.replace("--users 16 --duration 60", "--users 4 --duration 4")]
        bench = start(network, pod, {**container, "command": short, "image": tools}, volumes, extra=shared)
        docker("wait", bench.name)
        assert bench.state()["ExitCode"] == 0, bench.logs()
        printed = docker("logs", bench.name).splitlines()[-1]
        with tarfile.open(fileobj=io.BytesIO(base64.b64decode(printed)), mode="r:gz") as archive:
            archive.extractall(tmp_path / "receipts", filter="data")
        found = sorted((tmp_path / "receipts").rglob("*.json"))
        loaded = [receipt.load(file) for file in found]
        assert [file.name for file in found] == ["embed-cpu.json"], "receipts of two models have two names"
        assert loaded[0].valid
        rate = served_rate(loaded[0]).tokens_per_s
        measured = with_deploy(image, spec_file, flavors=[{**flavor, "receipt": str(found[0])}])
        (tmp_path / "inferctl.yaml").write_text(yaml.safe_dump(measured))
        document = json.loads(run("deploy", "--spec", tmp_path / "inferctl.yaml", "--json"))
        (deployed,) = document["models"][0]["flavors"]
        assert (deployed["rate"]["tokens_per_second"], deployed["rate"]["measured"]) == (rate, True)
        sources = {each["name"]: each["source"] for each in deployed["figures"]}
        # The bench sees the processes of the server, so it measures them.
        assert sources["load time"] == sources["cores"] == f"receipt {loaded[0].seal[:8]}"
        assert sources["host memory"] == f"peak of {sources['cores']}"
        assert not any("another model" in warning for warning in document["warnings"]), document["warnings"]
    finally:
        if bench:
            bench.remove()
        server.remove()
