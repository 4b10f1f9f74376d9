"""Tests `inferctl pin` with a real registry and a local hub."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.hub import Hub, Repository, online, serving
from tests.processes import execute, inferctl

pytestmark = [pytest.mark.docker, pytest.mark.timeout(180)]
SOURCE, COMMIT, NEWER = "org/m", "1" * 40, "2" * 40
DOWN = "localhost:9/base:1"  # the discard port, on which nothing listens
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

    def push(self, tag: str) -> str:
        """Push an image with one file and return its digest reference."""
        (self._folder / "file").write_bytes(os.urandom(1000))
        (self._folder / "Dockerfile").write_text("FROM scratch\nCOPY file /\n")
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


@pytest.mark.parametrize(("image", "code"), [(DOWN, 3), ("missing", 2), ("hub", 3)])
def test_nothing_is_written_if_a_registry_or_the_hub_does_not_respond(
    registry: Registry, hub: Hub, tmp_path: Path, image: str, code: int
) -> None:
    name = {"missing": f"{registry.name}:none", "hub": f"{registry.name}:1"}.get(image, image)
    if image == "hub":
        registry.push("1")
        hub.status = 503
    file = tmp_path / "inferctl.yaml"
    file.write_text(SPEC.replace("IMAGE", name))
    with changed(file) as lines:
        inferctl("pin", "--spec", file, "--json", env=online(hub, tmp_path / "home"), code=code)
    assert lines == []
