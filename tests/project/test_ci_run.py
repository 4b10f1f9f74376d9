"""Runs the files of `inferctl init --ci`: the jobs of a repository with only `inferctl.yaml` succeed and publish."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import hub
from tests.packages import install
from tests.processes import execute, python
from tests.project import forges
from tests.project.forges import Event, GitHub, GitLab, Result

# Another group than the other builds: its engine is its own, except for one build, and that of
# test_compression_builds.py.
pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.xdist_group("ci")]

ROOT = Path(__file__).resolve().parents[2]
MODEL = "team/minilm"
BRANCH = "Release/Trunk"
TAG = "Release-Trunk"
PLAN = {
    "name": "gate",
    "configurations": [{"name": "auto", "precision": "auto"}],
    "load": {"mode": "closed", "users": 2, "duration_s": 2, "warmup_s": 1},
    "corpus": "short",
    "repeats": 3,
    "quality": None,
}
VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"
MACHINE = """FROM {base}
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv git docker-cli docker-buildx
"""


def output(*command: str | Path, **environment: str) -> str:
    done = execute(*command, env={**os.environ, **environment}, code=0)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same path on the host and in the containers."""
    return tmp_path_factory.mktemp("ci")


@pytest.fixture(scope="module")
def machine_image(base_image: str) -> Iterator[str]:
    """A clean machine for jobs, from Debian packages: Python, Git, and the docker command with buildx."""
    name = "inferctl-test/ci-machine"
    command = ["docker", "buildx", "build", "--quiet", "--network", "host", "--load", "--tag", name, "-"]
    text = MACHINE.format(base=base_image)
    execute(*command, input=text, code=0)
    yield name
    subprocess.run(["docker", "image", "rm", "--force", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def package(folder: Path) -> str:
    """The requirement for pip: a wheel of this checkout."""
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    name = python("-c", code, cwd=ROOT, code=0).stdout.splitlines()[-1]
    return f"inferctl[bench] @ file://{folder / name}"


@dataclass
class Setting:
    """The settings that all jobs share."""

    folder: Path
    base_image: str
    wheels: Path
    package: str
    commit: str
    variables: dict[str, str]
    machine: Callable[[Path], Any]

    def repository(self, forge: str, image: str | None) -> Path:
        """Create a Git repository with `inferctl.yaml` and the files of `inferctl init --ci`."""
        origin = self.folder / f"origin-{uuid.uuid4().hex[:8]}"
        command = [sys.executable, "-m", "inferctl", "init", origin]
        output(*command, "--model", MODEL, "--base", "cpu", "--hardware", "cpu")
        file = origin / "inferctl.yaml"
        spec = yaml.safe_load(file.read_text())
        spec["model"]["revision"] = self.commit
        # On a busy machine the server rejects requests that would miss the default of 70 ms.
        spec["slo"] = {"p99_ms": 10_000}
        spec["serve"] = {"precision": "fp32"}  # random weights are far from those of bf16
        spec["image"] |= {"base_image": self.base_image, "wheels": str(self.wheels)}
        if image:
            spec["image"]["repository"] = image
        file.write_text(yaml.safe_dump(spec))
        output(*command, "--ci", forge, "--package", self.package)
        output("git", "init", "--quiet", "--initial-branch", BRANCH, origin)
        self.commit_all(origin)
        return origin

    def commit_all(self, origin: Path) -> str:
        output("git", "-C", origin, "add", "--all")
        identity = ("-c", "user.name=Someone", "-c", "user.email=someone@example.com")
        output("git", "-C", origin, *identity, "commit", "--quiet", "--allow-empty", "--message", "Change")
        return output("git", "-C", origin, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def setting(
    folder: Path, base_image: str, wheels: Path, package: str, tiny: Callable[..., Path], machine_image: str
) -> Iterator[Setting]:
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump(PLAN))
    shared = folder / "wheels"
    shutil.copytree(wheels, shared, copy_function=os.link)
    home = folder / "home"
    home.mkdir()
    environment = {
        **forges.passed_on(),
        "HOME": str(home),
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        # Each job installs the package again. Python compiles the few modules that it imports.
        "PIP_NO_COMPILE": "1",
    }
    found = [
        Path(name) for name in ("/etc/ssl/certs", "/usr/local/share/ca-certificates", "/etc/pip.conf", "/etc/xdg/pip")
    ]
    found += [Path(name) for name in os.environ.get("PIP_FIND_LINKS", "").split()]
    # A short measurement of so small a model has many responses, on a busy machine too.
    with hub.serving({MODEL: tiny("bert", "mean_tokens")}) as server:
        environment["HF_ENDPOINT"] = server.url

        def machine(socket: Path) -> Any:
            return forges.machine(machine_image, folder, socket, [path for path in found if path.exists()], environment)

        # The 60 dependencies are installed once. In the jobs, pip finds them on PYTHONPATH.
        dependencies = folder / "dependencies"
        version = output("docker", "run", "--rm", machine_image, "python3", "-c", VERSION)
        options = ("--target", str(dependencies), "--python-version", version, "--only-binary", ":all:")
        install(sys.executable, *options, package)
        for own in dependencies.glob("inferctl*"):
            shutil.rmtree(own)
        environment["PYTHONPATH"] = str(dependencies)

        yield Setting(
            folder,
            base_image,
            shared,
            package,
            server.repositories[MODEL].commit,
            {"PLAN": str(plan), "REPEATS": "3", "THRESHOLD": "60"},
            machine,
        )


def manifest(reference: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output("docker", "buildx", "imagetools", "inspect", "--raw", reference))
    return found


def exists(reference: str) -> bool:
    command = ["docker", "buildx", "imagetools", "inspect", "--raw", reference]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def content(reference: str) -> str:
    """Return the digest of the image without its attestations."""
    (entry,) = (one for one in manifest(reference)["manifests"] if one["platform"]["os"] == "linux")
    return str(entry["digest"])


def layers(socket: Path, reference: str) -> list[str]:
    """Return the digests of the layers of an image in an engine, before their compression."""
    show = ("image", "inspect", "--format", "{{json .RootFS.Layers}}", reference)
    found: list[str] = json.loads(output("docker", "-H", f"unix://{socket}", *show))
    return found


def provenance(reference: str) -> dict[str, Any]:
    """Return the provenance of an image in the registry."""
    name = reference.rpartition(":")[0]
    (attestation,) = (
        entry
        for entry in manifest(reference)["manifests"]
        if entry.get("annotations", {}).get("vnd.docker.reference.type") == "attestation-manifest"
    )
    predicates = [
        layer["annotations"]["in-toto.io/predicate-type"]
        for layer in manifest(f"{name}@{attestation['digest']}")["layers"]
    ]
    return {"digest": attestation["digest"], "predicates": predicates}


def clean(socket: Path) -> None:
    """Remove all images and caches of an engine, as on a new hosted runner."""
    for command in (("builder", "prune"), ("image", "prune")):
        output("docker", "-H", f"unix://{socket}", *command, "--all", "--force")


def variables(setting: Setting) -> dict[str, str]:
    return {f"INFERCTL_{name}": value for name, value in setting.variables.items()}


def test_github_publishes_the_measured_image_twice(setting: Setting, exporting_engine: Path) -> None:
    image = f"localhost:5000/ci-{uuid.uuid4().hex[:8]}/minilm"
    origin = setting.repository("github", image)
    github = GitHub(origin, variables(setting), {"REGISTRY_USER": "someone", "REGISTRY_PASSWORD": "secret"})
    clean(exporting_engine)
    with setting.machine(exporting_engine) as machine:
        commit = setting.commit_all(origin)
        first = github.run(machine, Event(commit, BRANCH, BRANCH))
        assert (first.green, first.job, first.cached) == (True, "publish", False)
        assert "No baseline" in first.summary
        assert "Log in" in first.steps
        published(image, commit, first)
        baseline = manifest(f"{image}:{TAG}")

        # A hosted runner keeps only the registry and the cache of the forge between two jobs.
        clean(exporting_engine)
        commit = setting.commit_all(origin)
        second = github.run(machine, Event(commit, BRANCH, BRANCH))
        assert (second.green, second.cached) == (True, True)
        assert "No baseline" not in second.summary
        assert list((second.workspace / "bench-results").glob("*/receipts/new.json"))
        published(image, commit, second)

        # A pull request from a fork has no secrets: it passes without a login and does not change the registry. Its
        # target has no baseline, so that the job measures nothing.
        before = manifest(f"{image}:{TAG}")
        request = Event(setting.commit_all(origin), "patch", BRANCH, target="unpublished", fork=True)
        third = github.run(machine, request)
        assert (third.green, third.job) == (True, "check")
        assert {"Log in", "Publish"}.isdisjoint(third.steps)
        assert "No baseline" in third.summary
        assert manifest(f"{image}:{TAG}") == before != baseline
        assert not exists(f"{image}:{request.commit}")


def published(image: str, commit: str, result: Result) -> None:
    """Check that both names are the same image in the registry and have provenance."""
    assert content(f"{image}:{commit}") == content(f"{image}:{TAG}")
    found = provenance(f"{image}:{TAG}")
    assert any(one.startswith("https://slsa.dev/provenance/") for one in found["predicates"])
    digest = next(line for line in result.summary.splitlines() if line.startswith("Published: ")).split()[1]
    assert manifest(digest) == manifest(f"{image}:{TAG}")
    print(f"{digest} has {found}", flush=True)


def test_gitlab_publishes_without_a_cache_of_the_engine_but_publishes_no_regression(
    setting: Setting, exporting_engine: Path
) -> None:
    """Both engines build all layers, and those of the second one are identical."""
    usual_engine = Path("/var/run/docker.sock")  # it cannot export a cache
    registry = f"localhost:5000/ci-{uuid.uuid4().hex[:8]}"
    origin, image = setting.repository("gitlab", None), f"{registry}/minilm"
    gitlab = GitLab(origin, setting.variables, registry)
    try:
        with setting.machine(usual_engine) as machine:
            commit = setting.commit_all(origin)
            first = gitlab.run(machine, Event(commit, BRANCH, BRANCH))
        assert (first.green, first.cached) == (True, False)
        assert "No baseline" in first.summary
        before = manifest(f"{image}:{TAG}")
        assert "layers" in before
        assert manifest(f"{image}:{commit}") == before
        assert not exists(f"{image}:buildcache")
        built_first = layers(usual_engine, f"{image}:{commit}")
    finally:
        built = output("docker", "images", "--quiet", "--no-trunc", image).split()
        subprocess.run(["docker", "image", "rm", "--force", *built], check=False, capture_output=True)

    with setting.machine(exporting_engine) as machine, slow_candidate(setting.folder, exporting_engine):
        commit = setting.commit_all(origin)
        gitlab.variables = {**setting.variables, "REPEATS": "6"}
        second = gitlab.run(machine, Event(commit, BRANCH, BRANCH))
    assert (second.green, second.cached) == (False, True), second.summary
    assert "Regression" in second.summary
    assert layers(exporting_engine, f"{image}:{commit}") == built_first
    assert manifest(f"{image}:{TAG}") == before
    assert not exists(f"{image}:{commit}")


@contextmanager
def slow_candidate(folder: Path, socket: Path) -> Iterator[None]:
    """Stop the candidate for most of the time as soon as it is ready, with signals.

    A limit of its CPU shows nothing on a machine that is so busy that the baseline gets no more.
    """
    docker = ("docker", "-H", f"unix://{socket}")
    known = set(folder.glob("workspace-*/new.json"))
    done = threading.Event()

    def slow_down() -> None:
        while not set(folder.glob("workspace-*/new.json")) - known:
            if done.wait(0.2):
                return
        # The newest container is the candidate, because the job starts the baseline first.
        newest, *_ = output(*docker, "ps", "--quiet", "--filter", "label=io.inferctl.role=serve").split()
        pid = int(output(*docker, "inspect", "--format", "{{.State.Pid}}", newest))
        with suppress(ProcessLookupError):
            while not done.is_set():
                os.kill(pid, signal.SIGSTOP)
                done.wait(1.0)
                os.kill(pid, signal.SIGCONT)
                done.wait(0.2)

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
