"""Renders deployments into folders and builds them with the real kustomize."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Objects = list[dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]
KUBECTL = Path(sys.executable).with_name("kubectl")


def kustomize(folder: Path) -> str:
    """Return what `kubectl kustomize` builds from `folder`."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(folder: Path) -> Objects:
    """Return the objects that `kubectl kustomize` builds from `folder`."""
    return [each for each in yaml.load_all(kustomize(folder), yaml.CSafeLoader) if each]


def write(files: dict[str, str], folder: Path) -> Path:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.fixture
def build(tmp_path: Path) -> Callable[[dict[str, str], str], Objects]:
    """Write the files of a deployment, build one of its folders, and return the objects."""

    def run(files: dict[str, str], folder: str) -> Objects:
        return objects(write(files, tmp_path) / folder)

    return run
