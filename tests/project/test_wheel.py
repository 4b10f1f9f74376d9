"""Tests the wheel in a separate environment outside of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.packages import install
from tests.processes import execute

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (
    "templates/",
    "base-images/",
    "benchmarks/plans/",
    "benchmarks/hardware/",
    "benchmarks/corpora/",
    "benchmarks/calibration/fitted.yaml",
    "benchmarks/calibration/front-end.json",
)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = execute(*command, cwd=cwd, stdin=subprocess.DEVNULL, code=0)
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    return folder / run(sys.executable, "-c", code).strip().splitlines()[-1]


def test_the_wheel_contains_exactly_the_tracked_assets(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {n.removeprefix("inferctl/_assets/") for n in archive.namelist() if n.startswith("inferctl/_assets/")}
    tracked = {name for name in run("git", "ls-files").splitlines() if name.startswith(SHIPPED)}
    assert packed == tracked


def test_the_wheel_contains_its_license_and_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (license_file,) = (name for name in archive.namelist() if name.endswith("licenses/LICENSE"))
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = archive.read(metadata).decode().partition("\n\n")[0].splitlines()
        assert "inferctl/py.typed" in archive.namelist()
    assert {"License-Expression: Apache-2.0", "License-File: LICENSE"} <= set(fields)


@pytest.mark.slow
def test_a_clean_environment_without_torch_can_init_check_and_render(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    install(python, str(wheel))
    command, work = tmp_path / "venv" / "bin" / "inferctl", tmp_path / "work"
    work.mkdir()
    assert run(command, "init", cwd=work).strip() == "inferctl.yaml"
    assert "FROM nvidia/cuda:" in run(command, "render", cwd=work)
    written = run(command, "render", "--output", "build", cwd=work).splitlines()
    assert all((work / path).exists() for path in written)
    run(command, "check", cwd=work)
    run(command, "schema", cwd=work)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode
    assert "not installed" in run(command, "doctor", cwd=work)
    # The server files of an image are the same from a wheel and from a checkout.
    code = (
        "from inferctl.image.render import server_files\n"
        "print(*(f'{n} {f.stat().st_size}' for n, f in server_files().items()), sep='\\n')"
    )
    assert run(python, "-c", code, cwd=work) == run(sys.executable, "-c", code, cwd=Path(os.sep))
