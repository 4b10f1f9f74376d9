"""Tests `inferctl bench --start` on the real engine and registry, with an image whose server is tiny."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inferctl import cli
from inferctl.core.errors import NotReadyError
from inferctl.image.docker import DockerEngine
from tests.image import tiny

pytestmark = pytest.mark.docker


def docker(*arguments: str, fails: bool = False) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert fails or done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def built(base_image: str, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`built(behaviour)` returns the name of an image whose last layer no build cache has. Afterwards, none is left."""
    names = []

    def make(behaviour: str = "works") -> str:
        name = f"localhost:5000/inferctl-test/{uuid.uuid4().hex}:x"
        names.append(name)
        tiny.build(tiny.rendered(base_image, behaviour), name, tmp_path / "context")
        writes = ["run", "--detach", "--user", "0", "--entrypoint", "sh", name, "-c", f"echo {name} > /made"]
        container = docker(*writes)
        docker("wait", container)
        settings = json.loads(docker("image", "inspect", name))[0]["Config"]
        changes = [
            f"ENTRYPOINT {json.dumps(settings['Entrypoint'])}",
            f"CMD {json.dumps(settings['Cmd'])}",
            "USER 10001",
        ]
        docker("commit", *(part for change in changes for part in ("--change", change)), container, name)
        docker("rm", container)
        return name

    yield make
    for name in names:
        repository = name.removesuffix(":x")  # also images that lost their tag to another one
        docker("image", "rm", "--force", *set(docker("images", "--quiet", repository).split()), fails=True)


def test_each_round_starts_a_pulled_and_a_present_image(
    built: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = built()
    docker("push", "--quiet", name)
    assert cli.run(["bench", "--start", name, "--repeats", "1", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "1 of " in printed and "empty store" not in printed, "the engine kept layers"
    assert "deploy.cold_start_s" in printed
    assert cli.run(["bench", "--start", name, "--repeats", "2", "--output", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pulls = [start["pull"] for start in found["starts"]]
    assert [pull is None for pull in pulls] == [False, True, False, True]
    assert all(pull["layers"] - pull["kept"] == 1 and pull["downloaded_s"] <= pull["seconds"] for pull in pulls[::2])
    assert all(start["container_s"] > 0 and start["response_s"] > 0 for start in found["starts"])
    assert found["image"]["reference"] in docker("image", "inspect", name, "--format", "{{.RepoDigests}}")
    assert 0 < found["image"]["compressed_bytes"] < found["image"]["size_bytes"]
    assert found in [json.loads(file.read_text()) for file in tmp_path.glob("start-*/start.json")]
    assert docker("ps", "--all", "--quiet", "--filter", f"ancestor={name}") == ""


def test_the_name_that_build_prints_is_measured_and_tags_are_kept(
    built: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = built()
    docker("push", "--quiet", name)
    digest = docker("image", "inspect", name, "--format", "{{index .RepoDigests 0}}")
    assert cli.run(["bench", "--start", digest, "--repeats", "2", "--output", str(tmp_path), "--json"]) == 0
    starts = json.loads(capsys.readouterr().out)["starts"]
    assert [start["pull"] is not None for start in starts] == [True, False, True, False]
    container = docker("create", digest)
    try:
        assert cli.run(["bench", "--start", digest, "--repeats", "1", "--output", str(tmp_path)]) == 2
    finally:
        docker("rm", container)
    tagged, pulled = (docker("image", "inspect", each, "--format", "{{.Id}}") for each in (name, digest))
    assert tagged == pulled


def test_an_image_in_no_registry_is_never_removed(
    built: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = built("locked")  # it asks for keys, which the request has not
    assert cli.run(["bench", "--start", name, "--repeats", "1", "--output", str(tmp_path), "--json"]) == 0
    assert [start["pull"] for start in json.loads(capsys.readouterr().out)["starts"]] == [None]


@pytest.mark.parametrize("problem", ["other image", "other name", "other digest", "in use", "ends", "wrong response"])
def test_an_image_that_cannot_be_measured_is_kept(
    problem: str, built: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = built({"ends": "dies", "wrong response": "refuses"}.get(problem, "works"))
    docker("push", "--quiet", name)
    identity = docker("image", "inspect", name, "--format", "{{.Id}}")
    other = f"inferctl-test/{uuid.uuid4().hex}:x"
    if problem == "other image":
        docker("tag", name, other)
        docker("tag", built(), name)
        docker("push", "--quiet", name)
        docker("tag", other, name)
        docker("image", "rm", other)
    elif problem == "other name":
        docker("tag", name, other)
    elif problem == "other digest":  # an image of another repository, pulled by its digest
        other = f"localhost:5000/{other}"
        docker("tag", name, other)
        docker("push", "--quiet", other)
        digests = docker("image", "inspect", name, "--format", '{{join .RepoDigests "\\n"}}').split()
        docker("image", "rm", other)
        other = next(each for each in digests if each.startswith(other.removesuffix(":x")))
        docker("pull", "--quiet", other)
    elif problem == "in use":
        container = docker("create", name)
    try:
        code = cli.run(["bench", "--start", name, "--repeats", "1", "--output", str(tmp_path)])
    finally:
        if problem == "in use":
            docker("rm", container)
        if problem in ("other name", "other digest"):
            docker("image", "rm", other)
    assert (code, "Traceback" in capsys.readouterr().err) == (1 if problem in ("ends", "wrong response") else 2, False)
    assert docker("image", "inspect", name, "--format", "{{.Id}}") == identity
    assert docker("ps", "--all", "--quiet", "--filter", f"ancestor={name}") == ""


@pytest.mark.parametrize(
    ("options", "named"),
    [(["a:b", "--users", "3"], "--users"), (["a:b", "--repeats", "0"], "--repeats"), ([""], "image name")],
)
def test_options_of_a_load_and_wrong_values_are_rejected(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", "--start", *options]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("problem", ["registry fails", "interrupted", "tag is moved"])
def test_a_changed_image_is_named_and_not_measured(
    problem: str,
    built: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, remove = built(), DockerEngine.remove_image
    docker("push", "--quiet", name)
    kept = docker("image", "inspect", name, "--format", "{{index .RepoDigests 0}}")

    def follow(engine: DockerEngine, reference: str) -> None:
        remove(engine, reference)
        if problem == "interrupted":
            raise KeyboardInterrupt
        if problem == "tag is moved":
            docker("tag", built(), name)
            docker("push", "--quiet", name)
        else:
            monkeypatch.setattr(DockerEngine, "pull", failing)

    def failing(*_: object) -> str:
        raise NotReadyError("the registry is down", "start it")

    monkeypatch.setattr(DockerEngine, "remove_image", follow)
    code = cli.run(["bench", "--start", name, "--repeats", "1", "--output", str(tmp_path)])
    error = capsys.readouterr().err
    assert code == (130 if problem == "interrupted" else 3)
    assert (f"docker pull {name}" in error) == (problem != "tag is moved")
    assert list(tmp_path.rglob("start.json")) == []
    docker("pull", "--quiet", kept)
    docker("image", "rm", kept)
