"""Tests a container from the spec to build, push, serving and benchmark, with a real engine and a real registry."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import openai
import pytest
import yaml

from inferctl.facts.precision import best_precision
from inferctl.image import locks
from inferctl.image.output_checks import SCORE_TOLERANCE
from inferctl.serve.engines import cpu
from tests import processes
from tests.deploy.conftest import objects
from tests.deploy.containers import Network, docker, folders
from tests.deploy.containers import start as start_container
from tests.processes import execute, free_port, is_ready, start, until

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(900)]

TEXTS = [
    "the cat sat on the mat",
    "a dog chased the ball",
    "x",
    "Quarterly revenue grew by nine percent.",
    "naïve café ☕",
]
REPOSITORY = "localhost:5000/e2e/minilm"
Vectors: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
# bf16 where this CPU has it: emulated, it takes several times as long.
PRECISION = best_precision(cpu.detect()[1])


inferctl = partial(processes.inferctl, code=0, timeout=1800, stdin=subprocess.DEVNULL)


def inspect(reference: str) -> dict[str, Any]:
    done = execute("docker", "image", "inspect", reference, code=0)
    found: dict[str, Any] = json.loads(done.stdout)[0]
    return found


@pytest.fixture(scope="module")
def spec_file(base_image: str, wheels: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("spec") / "inferctl.yaml"
    spec = {
        "name": "minilm",
        "model": {"source": str(minilm)},
        "serve": {"precision": PRECISION, "max_batch_tokens": 512},
        "image": {"repository": REPOSITORY, "base": "cpu", "base_image": base_image, "wheels": str(wheels)},
        "hardware": ["cpu"],
        "slo": {"p99_ms": 500},
    }
    file.write_text(yaml.safe_dump(spec))
    return file


@pytest.fixture(scope="module")
def pushed(spec_file: Path) -> Iterator[str]:
    """`name@sha256:...` of an image from `inferctl build --push`."""
    inferctl("check", "--spec", spec_file)
    done = inferctl("build", "--spec", spec_file, "--push", "--network", "host", "--json")
    built = json.loads(done.stdout)
    assert built["verified"]["cosine_min"] >= 0.999, built
    yield str(built["pushed"])
    images = execute("docker", "images", "--quiet", "--no-trunc", REPOSITORY)
    subprocess.run(["docker", "image", "rm", "--force", *set(images.stdout.split())], capture_output=True, check=False)


@pytest.fixture(scope="module")
def container(pushed: str, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a container with the image from the registry. The local image is removed first."""
    subprocess.run(["docker", "image", "rm", "--force", inspect(pushed)["Id"]], capture_output=True, check=True)
    server = start(tmp_path_factory.mktemp("container"), "--image", pushed, "--model", str(minilm))
    yield server.url
    assert server.stop() == 0
    running = execute("docker", "ps", "--quiet", "--filter", f"ancestor={pushed}", code=0)
    assert running.stdout == ""


def embed(url: str) -> Vectors:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.embeddings.create(model="minilm", input=TEXTS)
    return np.array([item.embedding for item in answer.data], dtype=np.float32)


def served(folder: Path, model: str | Path) -> Vectors:
    """Return the vectors of a server on this machine."""
    server = start(folder, "--model", str(model), "--name", "minilm", "--precision", PRECISION)
    try:
        return embed(server.url)
    finally:
        assert server.stop() == 0


@pytest.fixture(scope="module")
def from_host(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    return served(tmp_path_factory.mktemp("host"), minilm)


def test_the_container_and_a_host_process_return_the_same_to_the_openai_client(
    container: str, from_host: Vectors
) -> None:
    from_container = embed(container)
    assert from_container.shape == (len(TEXTS), 384)
    assert np.all(np.isfinite(from_container))
    # With the same weights, precision and code, only the order of additions can differ.
    assert np.min(np.sum(from_host * from_container, axis=1)) > 0.9999


def test_the_container_reports_its_image(container: str, pushed: str) -> None:
    info = json.load(urllib.request.urlopen(f"{container}/info"))
    assert info["precision"]["effective"] == PRECISION
    found = inspect(pushed)
    assert found["Config"]["User"] == "10001:10001"
    assert found["Config"]["StopSignal"] == "SIGTERM"
    labels = found["Config"]["Labels"]
    assert labels["io.inferctl.precision"] == PRECISION
    assert labels["org.opencontainers.image.base.digest"].startswith("sha256:")


# Writes the files of all imported modules of each Python process in a container.
WATCH = """
import atexit, os, sys
def write():
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())} - {None}
    with open(f"/seen/{os.getpid()}-{os.environ['RUN']}", "w") as seen:
        seen.write("\\n".join(files))
atexit.register(write)
def end(code, end=os._exit):
    write()
    end(code)
os._exit = end  # engine processes end without Python's finalization
"""
INSTALLED = """
import json
from importlib import metadata
found = {}
for one in metadata.distributions():
    if str(one.locate_file("")).startswith("/opt/inferctl"):
        found[one.name.lower()] = [str(one.locate_file(file)) for file in one.files]
print(json.dumps(found))
"""
# Imported only by a server that downloads its weights.
DOWNLOADS = {"hf-xet", "fsspec"}


def test_the_image_has_no_package_that_serving_does_not_import(pushed: str, minilm: Path, tmp_path: Path) -> None:
    """Compare the imports of the server and the fp32 reference in the image with the installed packages."""
    watch, seen = tmp_path / "watch", tmp_path / "seen"
    for folder in (watch, seen):
        folder.mkdir()
        folder.chmod(0o777)  # the container runs as another user
    (watch / "sitecustomize.py").write_text(WATCH)
    folders = inspect(pushed)["Config"]["Env"]
    path = next(item.partition("=")[2] for item in folders if item.startswith("PYTHONPATH="))
    docker = ["docker", "run", "--network", "host", "--volume", f"{minilm}:/model:ro", "--volume", f"{seen}:/seen"]
    docker += ["--volume", f"{watch}:/watch:ro", "--env", f"PYTHONPATH=/watch:{path}"]
    port = str(free_port())
    server = execute(
        *docker, "--detach", "--env", "RUN=server", pushed, "--host", "127.0.0.1", "--port", port, code=0
    ).stdout.strip()
    try:
        until(lambda: is_ready(f"http://127.0.0.1:{port}"))
        embed(f"http://127.0.0.1:{port}")
        for page in ("metrics", "openapi.json", "docs", "info"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}").read()
        subprocess.run(["docker", "stop", "--time", "60", server], capture_output=True, check=True)
    finally:
        subprocess.run(["docker", "rm", "--force", server], capture_output=True, check=True)
    python = inspect(pushed)["Config"]["Entrypoint"][0]
    once = [*docker, "--rm", "--interactive", "--env", "RUN=reference", "--entrypoint", python, pushed]
    subprocess.run([*once, "-m", "inferctl.serve.reference", "/model"], input=b'["a"]', capture_output=True, check=True)
    listed = execute(*once, "-c", INSTALLED, code=0).stdout
    runs = list(seen.iterdir())
    assert len(runs) >= 3, "the API process, its engine process and the reference"
    imported = {file for run in runs for file in run.read_text().splitlines()}
    unused = {name for name, files in json.loads(listed).items() if not imported & set(files)}
    assert unused - DOWNLOADS == set()
    assert (unused | set(json.loads(listed))) & set(locks.LEFT_OUT) == set()


def test_a_new_config_reuses_every_heavy_layer_and_is_obeyed(pushed: str, spec_file: Path, cross_encoder: Path) -> None:
    before = inspect(pushed)["RootFS"]["Layers"]
    changed = spec_file.with_name("changed.yaml")
    spec = yaml.safe_load(spec_file.read_text())
    # A precision that `auto` does not select. The model is so small that it is fast when emulated, too.
    spec["serve"]["precision"] = other = "fp32" if PRECISION == "bf16" else "bf16"
    changed.write_text(yaml.safe_dump(spec))
    done = inferctl("build", "--spec", changed, "--push", "--network", "host", "--no-verify", "--json")
    reference = json.loads(done.stdout)["pushed"]
    after = inspect(reference)["RootFS"]["Layers"]
    # base | torch closure | server dependencies | server | config
    assert len(before) == len(after) == 5
    assert before[:4] == after[:4]
    assert before[4] != after[4]
    verified = json.loads(inferctl("verify", reference, "--model", cross_encoder, "--json").stdout)["verified"]
    assert (verified["task"], verified["precision"], verified["texts"]) == ("rerank", other, 8)
    assert verified["score_difference"] <= verified["tolerance"] == SCORE_TOLERANCE[other]


def test_a_model_image_is_baked_without_an_upload_of_its_weights_and_is_served(
    pushed: str,
    spec_file: Path,
    minilm: Path,
    from_host: Vectors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    source = inferctl("model", "push", minilm, f"{REPOSITORY}-model:v1").stdout.strip()
    spec = yaml.safe_load(spec_file.read_text())
    spec["model"] = {"source": source, "weights": "bake"}
    baked = spec_file.with_name("baked.yaml")
    baked.write_text(yaml.safe_dump(spec))
    built = json.loads(inferctl("build", "--spec", baked, "--push", "--network", "host", "--json").stdout)
    assert built["verified"]["cosine_min"] >= 0.999, built
    assert len(inspect(built["pushed"])["RootFS"]["Layers"]) == len(inspect(pushed)["RootFS"]["Layers"]) + 2
    assert np.array_equal(served(tmp_path, source), from_host)


def test_a_container_without_enough_memory_names_its_limit(pushed: str, minilm: Path) -> None:
    ended = execute("docker", "run", "--rm", "--memory", "300m", "--volume", f"{minilm}:/model:ro", pushed)
    assert ended.returncode == 3, ended.stderr
    assert "314.6 MB" in ended.stderr
    assert "raise the memory limit" in ended.stderr.partition("hint:")[2]


def test_the_image_serves_a_sparse_encoder(pushed: str, splade: Path) -> None:
    command = ("verify", pushed, "--model", splade, "--network", "host", "--against", "sentence-transformers", "--json")
    verified = json.loads(inferctl(*command).stdout)["verified"]
    assert verified["cosine_min"] > 0.99
    assert verified["library"]["cosine_min"] > 0.99


def test_two_pods_of_an_embed_job_write_what_one_run_writes(
    base_image: str, spec_file: Path, minilm: Path, tmp_path: Path
) -> None:
    spec, file, name = yaml.safe_load(spec_file.read_text()), tmp_path / "inferctl.yaml", f"{REPOSITORY}:embed"
    spec["image"] |= {"embed": True, "tag": "embed"}
    flavor = {"hardware": "cpu", "min_replicas": 1, "max_replicas": 2, "tokens_per_second": 1}
    spec["deploy"] = {"weights": {"pvc": "weights"}, "flavors": [flavor]}
    file.write_text(yaml.safe_dump(spec))
    inferctl("build", "--spec", file, "--network", "host", "--no-verify")
    run = ("--embed", "texts", "--output", tmp_path / "job", "--", "in.jsonl", "--output", "out", "--range-rows", "7")
    inferctl("deploy", "--spec", file, *run)
    (job,) = (each for each in objects(tmp_path / "job/embed/default") if each["kind"] == "Job")
    pod, network, outputs = job["spec"]["template"]["spec"], Network(base_image), []
    (container,) = pod["containers"]
    try:
        for parts in (["0/2", "1/2"], ["0/1"]):
            data = tmp_path / f"data{len(parts)}"
            data.mkdir()
            data.chmod(0o777)
            rows = ({"id": number, "text": text * number} for number in range(9) for text in TEXTS)
            (data / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            for part in parts:
                # A kubelet expands the last argument.
                expanded = {**container, "command": [*container["command"][:-1], part]}
                volumes = {**folders(pod, tmp_path / part), "model": minilm, "data": data}
                started = start_container(network, pod, expanded, volumes, extra=("--workdir", container["workingDir"]))
                assert docker("wait", started.name).strip() == "0", started.logs()
                started.remove()
                assert (data / "out/receipt.json").exists() == (part == parts[-1])
            outputs.append({each.name: each.read_bytes() for each in (data / "out").glob("part-*[lt]")})
    finally:
        network.remove()
        subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True, check=False)
    assert len(outputs[0]) >= 7 and outputs[0] == outputs[1]


def test_a_rendered_folder_has_identical_layers_at_another_commit(
    pushed: str, spec_file: Path, tmp_path: Path, wheels: Path
) -> None:
    """Render the image and build it at another commit. test_ci_run.py compares what two engines build."""
    inferctl("render", "--spec", spec_file, "--output", tmp_path / "build")
    command = ["docker", "buildx", "build", "--quiet", "--network", "host"]
    command += ["--build-context", f"wheels={wheels}", "--build-arg", "SOURCE_DATE_EPOCH=1700000000"]
    image = execute(*command, tmp_path / "build", code=0).stdout.strip()
    try:
        assert inspect(image)["RootFS"]["Layers"] == inspect(pushed)["RootFS"]["Layers"]
        assert inspect(image)["Created"].startswith("2023-11-14T22:13:20")
        # The spec is not in a repository, so the creation time is today.
        assert inspect(pushed)["Created"].startswith(time.strftime("%Y-%m-%dT00:00:00", time.gmtime()))
    finally:
        subprocess.run(["docker", "image", "rm", "--force", image], capture_output=True, check=False)
