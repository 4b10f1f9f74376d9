"""Tests the command `inferctl build`: stdout, hints and exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import yaml

from inferctl import cli
from tests.http_servers import Handler, serving
from tests.models.model_folders import write_model
from tests.processes import execute, until

HASH = f"--hash=sha256:{'0' * 64}"


def spec(folder: Path, model: dict[str, str] | None = None, **image: str) -> Path:
    """Write a spec, of a model without tensors if it names none."""
    locks = folder / "locks"
    locks.mkdir()
    for name in ("torch", "server"):
        (locks / f"{name}.txt").write_text(f"{name}-of-nowhere==1 {HASH}\n")
    content = {
        "name": "tiny",
        "model": model or {"source": str(write_model(folder / "model", {}))},
        "image": {"base": "cpu", "locks": str(locks), **image},
    }
    file = folder / "inferctl.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def inferctl(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process."""
    line, out, err = list(map(str, arguments)), io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, environment), redirect_stdout(out), redirect_stderr(err):
        code = cli.run(line)
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())


def test_a_dry_run_needs_no_engine_and_prints_plan_and_dockerfile(tmp_path: Path) -> None:
    file = spec(tmp_path, repository="registry.example.com/ml/tiny")
    done = inferctl("build", "--dry-run", "--push", "--spec", file, DOCKER_HOST=f"unix://{tmp_path}/none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("registry.example.com/ml/tiny:auto-")
    for part in ("verify: start the image", "push to registry.example.com", "FROM python:3.11-slim-trixie"):
        assert part in done.stdout
    assert "[base.digest]" in done.stderr


def test_a_dry_run_as_json_is_one_document_with_each_name_once_and_the_mirror(tmp_path: Path) -> None:
    names = ["r.example.com/a/b:latest", "r.example.com/a/b:2", "s.example.com/c:1"]
    tags = [part for name in ("r.example.com/a/b", *names) for part in ("--tag", name)]
    file = spec(tmp_path)
    plan = json.loads(inferctl("build", "--dry-run", "--json", "--push", *tags, "--spec", file).stdout)
    assert (plan["reference"], plan["references"]) == (names[0], names)
    assert plan["steps"][-2:] == ["push to r.example.com", "push to s.example.com"]
    assert [finding["topic"] for finding in plan["findings"]] == ["base.digest"]
    assert (plan["platforms"], plan["base"]["reference"]) == (["linux/amd64"], "python:3.11-slim-trixie")
    assert "FROM" in plan["dockerfile"]
    mirror = f"r.example.com/python@sha256:{'1' * 64}"
    file.write_text(file.read_text().replace("base: cpu", f"base: cpu\n  base_image: {mirror}"))
    plan = json.loads(inferctl("build", "--dry-run", "--json", "--spec", file).stdout)
    assert plan["base"] == {"key": "cpu", "reference": mirror, "digest": mirror.partition("@")[2]}
    assert plan["findings"] == []


def test_the_image_is_built_for_the_platform_of_the_spec(tmp_path: Path) -> None:
    file = spec(tmp_path, platform="linux/arm64")
    assert "build for linux/arm64 on cpu" in inferctl("build", "--dry-run", "--spec", file).stdout
    other = inferctl("build", "--dry-run", "--platform", "linux/amd64", "--spec", file)
    assert "build for linux/amd64 on cpu" in other.stdout


def test_a_branch_as_revision_is_rejected(tmp_path: Path) -> None:
    file = spec(tmp_path, {"source": "org/model", "weights": "bake", "revision": "main"})
    failed(inferctl("build", "--dry-run", "--spec", file), 1, "'main' is not a commit", "--allow-floating")
    assert "'main' is not a commit" in inferctl("check", "--spec", file).stdout.replace("\n      ", " ")


def failed(done: subprocess.CompletedProcess[str], code: int, message: str, hint: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert message in done.stderr
    assert hint in done.stderr.partition("hint: ")[2]


def test_an_unpinned_hub_model_is_rejected_unless_it_is_allowed(tmp_path: Path) -> None:
    file = spec(tmp_path, {"source": "sentence-transformers/all-MiniLM-L6-v2", "weights": "download"})
    failed(inferctl("build", "--dry-run", "--spec", file), 1, "not pinned", "--allow-floating")
    allowed = inferctl("build", "--dry-run", "--allow-floating", "--spec", file)
    assert allowed.returncode == 0
    assert "[revision]" in allowed.stderr


def test_without_its_weights_an_image_that_mounts_them_is_built_but_not_verified(tmp_path: Path) -> None:
    file = spec(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    failed(inferctl("build", "--spec", file), 2, "no *.safetensors weights", "save_pretrained")
    assert inferctl("build", "--dry-run", "--no-verify", "--spec", file).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--tag", "MyOrg/minilm"], "'MyOrg/minilm' is not an image name", "lower case"),
        (["--tag", f"r.example.com/a@sha256:{'1' * 64}"], "has a digest", "name and a tag"),
        (["--push"], "--push requires a repository", "image.repository"),
        (["--dry-run", "--network", "zzz"], "'zzz' is not one of 'host'", "build --help"),
        (["--dry-run", "--network", ""], "'' is not one of 'host'", "build --help"),
        (["--dry-run", "--platform", "linux"], "'linux' is not a valid platform", "linux/amd64"),
        (["--platform", "linux/s390x"], "cpu is not available for linux/s390x", "--platform"),
    ],
)
def test_bad_options_are_rejected_without_the_engine(
    tmp_path: Path, arguments: list[str], message: str, hint: str
) -> None:
    nowhere = f"unix://{tmp_path}/none"
    failed(inferctl("build", "--spec", spec(tmp_path), *arguments, DOCKER_HOST=nowhere), 2, message, hint)


@pytest.mark.docker
def test_a_missing_package_fails_the_build_with_a_hint(base_image: str, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    file = spec(tmp_path, base_image=base_image, wheels=str(wheels))
    failed(inferctl("build", "--spec", file), 2, "wheels has no wheels", "pip download")
    (wheels / "other-1.0-py3-none-any.whl").write_bytes(b"")
    done = inferctl("build", "--spec", file)
    failed(done, 1, "the build failed in [", "inferctl lock")
    assert "No matching distribution found" in done.stderr


@contextmanager
def silent_index() -> Iterator[tuple[str, threading.Event]]:
    """A package index that never responds, and an event that is set by its first request."""
    asked, over = threading.Event(), threading.Event()

    class Silent(Handler):
        def do_GET(self) -> None:
            asked.set()
            over.wait()

    with serving(Silent) as port:
        yield f"http://127.0.0.1:{port}/", asked
        over.set()


@pytest.mark.docker
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_stops_at_once_and_leaves_no_output(
    base_image: str, tmp_path: Path, sign: signal.Signals
) -> None:
    name = f"inferctl-test/{uuid.uuid4().hex}:x"
    with silent_index() as (url, asked):
        pip_conf = tmp_path / "pip.conf"
        pip_conf.write_text(f"[global]\nindex-url = {url}\ntimeout = 300\n")
        file = spec(tmp_path, base_image=base_image)
        command = [sys.executable, "-m", "inferctl", "build", "--spec", str(file), "--tag", name]
        command += ["--network", "host", "--pip-conf", str(pip_conf)]
        building = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        assert asked.wait(110)
        building.send_signal(sign)
        out, err = building.communicate(timeout=60)
    assert building.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert list(tmp_path.glob("*inferctl-*")) == [], "the build context is gone"
    until(lambda: str(tmp_path) not in execute("ps", "-eo", "args").stdout)
    assert subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode != 0


@pytest.mark.docker
def test_a_missing_builder_is_an_error(engine: None, tmp_path: Path) -> None:
    done = inferctl("build", "--no-verify", "--spec", spec(tmp_path), BUILDX_BUILDER="nowhere")
    failed(done, 3, 'no builder "nowhere"', "inferctl doctor")
