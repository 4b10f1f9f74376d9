"""Renders deployments into folders, builds them with the real kustomize, and builds images for their containers."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import execute, python

Objects = list[dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]
KUBECTL = Path(sys.executable).with_name("kubectl")


def kustomize(folder: Path) -> str:
    """Return what `kubectl kustomize` builds from `folder`."""
    done = execute(KUBECTL, "kustomize", folder, code=0)
    return done.stdout


def parsed(text: str) -> Objects:
    """Return the objects in the documents of `text`."""
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def objects(folder: Path) -> Objects:
    """Return the objects that `kubectl kustomize` builds from `folder`."""
    return parsed(kustomize(folder))


def write(texts: dict[str, str], folder: Path) -> Path:
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@functools.cache
def _built(texts: frozenset[tuple[str, str]], folder: str) -> str:
    with tempfile.TemporaryDirectory() as place:
        return kustomize(write(dict(texts), Path(place)) / folder)


@pytest.fixture
def build() -> Callable[[dict[str, str], str], Objects]:
    """Build a folder of the files of a deployment, and return the objects. Equal files are built once."""
    return lambda files, folder: parsed(_built(frozenset(files.items()), folder))


@contextlib.contextmanager
def built_image(name: str, folder: Path) -> Iterator[str]:
    """Build the Dockerfile in `folder`, yield the tag of the image, and remove it."""
    tag = f"inferctl-test/{name}:{os.getpid()}"
    subprocess.run(["docker", "build", "--quiet", "--network", "host", "--tag", tag, folder], check=True)
    yield tag
    subprocess.run(["docker", "image", "rm", "--force", tag], capture_output=True, check=False)


@pytest.fixture(scope="session")
def tools(base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tools image of the documentation. Its base is the stand-in, with a folder of wheels as the package index."""
    text = (ROOT / "docs/examples/kubernetes/tools/Dockerfile").read_text()
    (extras,) = re.findall(r"\.whl\)(\[[^]]+\])", text)
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("tools")
    make_wheel = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = python("-c", make_wheel, cwd=ROOT, code=0)
    wheel = folder / done.stdout.strip().splitlines()[-1]
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary"]
    subprocess.run([*download, ":all:", "--dest", str(base / "wheels"), f"{wheel}{extras}"], check=True)
    # What python:3.13-slim has.
    (base / "Dockerfile").write_text(
        f"FROM {base_image}\nCOPY wheels /wheels-of-the-index\n"
        "RUN ln -s pip3 /usr/local/bin/pip && ln -s python3.11 /usr/local/bin/python\n"
        "ENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels-of-the-index\n"
    )
    with built_image("tools-base", base) as stand_in:
        changed, replaced = re.subn(r"^FROM python:3\.13-slim$", f"FROM {stand_in}", text, flags=re.MULTILINE)
        assert replaced == 1
        (folder / "Dockerfile").write_text(changed)
        with built_image("tools", folder) as tag:
            yield tag
