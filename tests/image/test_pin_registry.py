"""Tests `inferctl pin` and `inferctl catalog check` with a real registry and a local hub."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub import Hub, Repository, online, serving
from tests.processes import execute, inferctl

pytestmark = [pytest.mark.docker, pytest.mark.timeout(180)]
SOURCE, COMMIT, NEWER = "org/m", "1" * 40, "2" * 40
DOWN = "localhost:9/base:1"  # the discard port, on which nothing listens
REQUIRE = "cuda>=12.8 brand=tesla,driver>=535,driver<536"
SPEC = """\
# What the search service runs.
name: small
model:
  source: org/m  # ours
image:
  base: cpu
  base_image: IMAGE   # the mirror
serve: {precision: fp32}
"""


class Registry:
    """A repository at localhost:5000 for one test."""

    def __init__(self, folder: Path) -> None:
        self.name = f"localhost:5000/inferctl-tests/{uuid.uuid4().hex}"
        self._folder = folder
        self._made: list[str] = []

    def push(self, tag: str, *, size: int = 1000, **environment: str) -> str:
        """Push an image with one incompressible file and return its digest reference."""
        (self._folder / "file").write_bytes(os.urandom(size))
        lines = ["FROM scratch", *(f'ENV {key}="{value}"' for key, value in environment.items()), "COPY file /"]
        (self._folder / "Dockerfile").write_text("\n".join(lines) + "\n")
        name = f"{self.name}:{tag}"
        self._made.append(_docker("build", "--quiet", "--tag", name, str(self._folder)))
        _docker("push", "--quiet", name)
        return _docker("image", "inspect", "--format", "{{index .RepoDigests 0}}", name)

    def remove(self) -> None:
        for image in self._made:
            subprocess.run(["docker", "image", "rm", "--force", image], capture_output=True, check=False)


def _docker(*arguments: str) -> str:
    return execute("docker", *arguments, code=0).stdout.strip()


@pytest.fixture
def registry(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    made = Registry(tmp_path_factory.mktemp("context"))
    yield made
    made.remove()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "model").mkdir()
    with serving({SOURCE: Repository(tmp_path / "model", commit=COMMIT)}) as running:
        yield running


@contextmanager
def changed(file: Path) -> Iterator[list[str]]:
    """Collect the lines of `file` that the body changes or adds."""
    before, lines = file.read_text().splitlines(), []
    yield lines
    after = file.read_text().splitlines()
    assert [line for line in after if line.lstrip().startswith("#")] == ["# What the search service runs."]
    lines += [line for line in after if line not in before]


def test_pin_writes_both_pins_and_updates_them_only_on_request(registry: Registry, hub: Hub, tmp_path: Path) -> None:
    first = registry.push("1")
    file = tmp_path / "inferctl.yaml"
    file.write_text(SPEC.replace("IMAGE", f"{registry.name}:1"))
    file.chmod(0o640)
    environment = online(hub, tmp_path / "home")

    def pin(*options: str) -> subprocess.CompletedProcess[str]:
        return inferctl("pin", "--spec", file, *options, env=environment)

    unpinned = pin("--check")
    assert unpinned.returncode == 1, unpinned.stderr
    assert "model.revision and image.base_image" in unpinned.stderr
    assert f"run `inferctl pin --spec {file}`" in unpinned.stderr
    assert hub.requests == []
    before = file.read_text()
    assert COMMIT in pin("--dry-run").stdout
    assert file.read_text() == before

    tagged = first.replace("@", ":1@")
    with changed(file) as lines:
        done = pin()
    assert done.returncode == 0, done.stderr
    assert lines == [f'  revision: "{COMMIT}"', f"  base_image: {tagged}   # the mirror"]
    assert done.stdout.splitlines() == [
        f"model.revision: not set -> {COMMIT}",
        f"image.base_image: {registry.name}:1 -> {tagged}",
    ]
    assert file.stat().st_mode & 0o777 == 0o640
    assert pin("--check").returncode == 0

    found = json.loads(inferctl("check", "--spec", file, "--json", env=environment).stdout)
    assert not [f for f in found["findings"] if f["topic"] in ("base.digest", "revision")], found["findings"]
    with changed(file) as lines:
        assert "is unchanged" in pin().stderr
    assert lines == []

    second = registry.push("1")
    hub.repositories[SOURCE].commit = NEWER
    with changed(file) as lines:
        done = pin()
    assert (done.returncode, lines) == (0, [])
    assert done.stderr.count("inferctl pin --update") == 2
    document = json.loads(pin("--update", "--json").stdout)
    assert [change["new"] for change in document["changes"]] == [NEWER, second.replace("@", ":1@")]
    assert document["written"]
    assert yaml.safe_load(file.read_text())["model"]["revision"] == NEWER


def test_a_pinned_spec_renders_and_builds(registry: Registry, hub: Hub, tmp_path: Path, base_image: str) -> None:
    name, _, digest = base_image.partition("@")
    tagged = f"{name}:trixie-python3.11@{digest}"
    (tmp_path / "Dockerfile").write_text(f"FROM {tagged}\n")
    _docker("build", "--quiet", str(tmp_path))
    file = tmp_path / "inferctl.yaml"
    file.write_text(SPEC.replace("IMAGE", tagged))
    done = inferctl("render", "--spec", file, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    dockerfile = (tmp_path / "out" / "Dockerfile").read_text()
    assert tagged in dockerfile
    assert digest in dockerfile.partition("org.opencontainers.image.base.digest")[2]


@pytest.mark.parametrize("image", [DOWN, "missing"])
def test_the_commit_is_written_if_the_registry_does_not_respond(
    registry: Registry, hub: Hub, tmp_path: Path, image: str
) -> None:
    file = tmp_path / "inferctl.yaml"
    file.write_text(SPEC.replace("IMAGE", f"{registry.name}:none" if image == "missing" else image))
    with changed(file) as lines:
        done = inferctl("pin", "--spec", file, env=online(hub, tmp_path / "home"))
    assert done.returncode == (2 if image == "missing" else 3), done.stderr
    assert lines == [f'  revision: "{COMMIT}"']
    assert "image.base_image" in done.stderr
    assert "model.revision was written" in done.stderr


def test_the_digest_is_written_if_the_hub_does_not_respond(registry: Registry, hub: Hub, tmp_path: Path) -> None:
    pushed = registry.push("1")
    hub.status = 503
    file = tmp_path / "inferctl.yaml"
    file.write_text(SPEC.replace("IMAGE", f"{registry.name}:1"))
    done = inferctl("pin", "--spec", file, "--json", env=online(hub, tmp_path / "home"))
    document = json.loads(done.stdout)
    assert done.returncode == 3, done.stderr
    assert [failure["path"] for failure in document["failed"]] == ["model.revision"]
    assert not document["pinned"]
    assert pushed.replace("@", ":1@") in file.read_text()


def base_file(folder: Path, reference: str, **facts: Any) -> Path:
    """Write a base file: the shipped CUDA 12.8 base with another image and other facts."""
    shipped = Path(__file__).resolve().parents[2] / "base-images" / "cuda12.8.yaml"
    document = {**yaml.safe_load(shipped.read_text()), "reference": reference, "require_cuda": REQUIRE, **facts}
    for fact in facts:
        if facts[fact] is None:
            document["notes"][fact] = "not known in this test"
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def facts_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return {row["fact"]: row["verdict"] for row in json.loads(done.stdout)["facts"]}


def test_catalog_check_compares_facts_with_the_registry(registry: Registry, tmp_path: Path) -> None:
    pushed = registry.push("1", size=1_000_000, CUDA_VERSION="12.8.1", NVIDIA_REQUIRE_CUDA=REQUIRE)
    reference, digest = f"{registry.name}:1", pushed.partition("@")[2]
    file = base_file(tmp_path, reference, digest=digest, compressed_bytes=1_100_000)
    done = inferctl("catalog", "check", file, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    expected = ["tag", "digest", "compressed_bytes", "cuda", "require_cuda"]
    assert facts_of(done) == dict.fromkeys(expected, "same")

    for fact, value, verdict in (
        ("digest", None, "unrecorded"),
        ("digest", f"sha256:{'0' * 64}", "differs"),
        ("compressed_bytes", 2_600_000, "differs"),
        ("cuda", "13.0", "differs"),
        ("require_cuda", "cuda>=12.8", "differs"),
    ):
        given = {"digest": digest, "compressed_bytes": 1_000_000, fact: value}
        done = inferctl("catalog", "check", str(base_file(tmp_path, reference, **given)), "--json")
        assert done.returncode == (1 if verdict == "differs" else 0), (fact, done.stdout, done.stderr)
        assert {key: v for key, v in facts_of(done).items() if v != "same"} == {fact: verdict}
    done = inferctl("catalog", "check", file)
    assert "differs" in done.stdout


@pytest.mark.parametrize(("image", "code"), [("missing", 1), (DOWN, 3)])
def test_catalog_check_distinguishes_a_missing_tag_from_a_registry_that_is_down(
    registry: Registry, tmp_path: Path, image: str, code: int
) -> None:
    file = base_file(tmp_path, f"{registry.name}:none" if image == "missing" else image)
    done = inferctl("catalog", "check", file, "--json")
    assert done.returncode == code, done.stderr
    assert facts_of(done) == {"tag": "differs" if code == 1 else "unknown"}
    assert not json.loads(done.stdout)["same"]
    assert inferctl("catalog", "check", file).returncode == code
