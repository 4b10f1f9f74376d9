"""Fixtures shared by all tests: the real model, the real Docker Engine, golden files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
# A job that a shell starts in the background ignores Ctrl-C, and so would every process that the tests start to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
MODEL = ROOT / "models" / "all-MiniLM-L6-v2"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="Write the golden files anew instead of comparing with them."
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests that need the Docker Engine run in one worker: BuildKit makes equal steps of builds at the same time one step."""
    if item.get_closest_marker("docker"):
        item.add_marker(pytest.mark.xdist_group("docker"))


@pytest.fixture(scope="session", autouse=True)
def _without_foreign_settings() -> None:
    """Settings of the person who runs the tests must not leak into them."""
    for variable in [v for v in os.environ if v.startswith("INFERCTL_") and v != "INFERCTL_REQUIRE"]:
        del os.environ[variable]
    os.environ["COLUMNS"] = "80"
    os.environ["NO_COLOR"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Two workers whose torch threads spin while they wait take each other's cores: many times slower.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    if not (MODEL / "model.safetensors").is_file():
        pytest.fail(f"{MODEL.relative_to(ROOT)} is not there: `make model` fetches it")
    return MODEL


def _missing(what: str, problem: str) -> NoReturn:
    """Skips; fails where INFERCTL_REQUIRE names `what` (`docker`, `gpu`)."""
    if what in os.environ.get("INFERCTL_REQUIRE", "").split(","):
        pytest.fail(problem)
    pytest.skip(problem)


@pytest.fixture(scope="session")
def gpu() -> None:
    """A CUDA GPU. Skips without one, unless INFERCTL_REQUIRE=gpu turns that into a failure."""
    import torch

    if not torch.cuda.is_available():
        _missing("gpu", "there is no CUDA GPU")


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker Engine with buildx. Skips without one, unless INFERCTL_REQUIRE=docker turns that into a failure."""
    problem = None
    if not shutil.which("docker"):
        problem = "there is no docker command"
    elif subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
        problem = "the Docker Engine does not answer"
    elif subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False).returncode:
        problem = "docker has no buildx"
    if problem:
        _missing("docker", problem)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("name.txt", text)`: compare with tests/golden/name.txt, or write it with --update-golden."""

    def check(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"no golden file {name}: run `make golden` and read what it writes"
        assert text == file.read_text(encoding="utf-8"), (
            f"differs from tests/golden/{name}; `make golden` writes it anew"
        )

    return check


@pytest.fixture(scope="session")
def base_image(engine: None) -> str:
    """Digest reference of the stand-in base (Debian with Python 3.11), which `.ci/stand-in-base` makes and pushes."""
    name = "localhost:5000/base:trixie-python3.11"
    done = subprocess.run(
        ["docker", "image", "inspect", "--format", "{{index .RepoDigests 0}}", name],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return done.stdout.strip()
    problem = (
        f"there is no image {name}: `.ci/stand-in-base {name}` makes it (as root, with a registry at localhost:5000)"
    )
    _missing("docker", problem)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels that replaces the package index: the versions of the shipped CPU locks, for this Python."""
    from inferctl import catalog, locks

    folder = tmp_path_factory.mktemp("wheels")
    shipped = locks.load(catalog.base("cpu"), None, int8=False)
    pins = {**locks.versions(shipped.torch or ""), **locks.versions(shipped.server)}
    (folder / "pins.txt").write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    # Also what the locks leave out: resolving them anew takes it.
    wanted = [f"torch=={pins['torch']}", *locks.declared_requirements("serve")]
    subprocess.run([*command, "--constraint", str(folder / "pins.txt"), *wanted], check=True)
    (folder / "pins.txt").unlink()
    return folder
