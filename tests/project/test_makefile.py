"""The installation of packages by the Makefile, with a program in place of uv that prints how it was called."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.processes import execute

ROOT = Path(__file__).resolve().parents[2]
SECRET = "https://user:pa$word@index.example/simple"
SETTINGS = {
    "PIP_INDEX_URL": SECRET,
    "PIP_EXTRA_INDEX_URL": "https://a.example https://b.example",
    "PIP_FIND_LINKS": "/o'brien/wheels  /other",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the Makefile with an environment that has no packages, and a program `uv`."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\ntr "\\0" " " </proc/$$/cmdline\necho\nenv\n')
    uv.chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str, settings: dict[str, str] = SETTINGS) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_", "MAKE"))}
    done = execute("make", "--silent", *arguments, cwd=checkout, env=environment | settings, code=0)
    return done.stdout


def test_uv_gets_the_settings_of_pip_and_no_command_line_has_them(checkout: Path) -> None:
    lines = make(checkout, f"UV={checkout}/uv", ".venv/.demo").splitlines()
    assert f"UV_DEFAULT_INDEX={SECRET}" in lines
    assert "UV_INDEX=https://a.example https://b.example" in lines
    assert "UV_INDEX_STRATEGY=unsafe-best-match" in lines
    assert "UV_FIND_LINKS=/o'brien/wheels,/other" in lines
    (command,) = (line for line in lines if " pip install " in line)
    assert "index.example" not in command
    # A newer torch of an index, with CUDA, is not installed in place of the CPU build of a folder.
    assert "--constraint constraints.txt" in command
    (torch,) = re.findall(r"^torch==(\d+\.\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"\ntorch=={torch}." in (ROOT / "base-images" / "locks" / "torch2.13-cpu" / "torch.txt").read_text()


def test_a_room_needs_neither_the_model_nor_the_packages_of_other_rooms(checkout: Path) -> None:
    asked = make(checkout, "UV=", "--dry-run", "test", "ROOM=core")
    assert asked.splitlines()[-1].endswith(" tests/core")
    assert "dev-all" not in asked and "fetch_model" not in asked
    assert "dev-all" in (every := make(checkout, "UV=", "--dry-run", "test")) and "fetch_model" in every


def test_a_room_that_does_not_exist_is_an_error_before_the_installation(checkout: Path) -> None:
    (checkout / "tests" / "core").mkdir(parents=True)
    (checkout / "tests" / "core" / "test_it.py").touch()
    done = execute("make", "--silent", "test", "ROOM=cor", cwd=checkout, code=2)
    assert done.stdout == "error: tests/cor does not exist\n\nhint: ROOM is one of core\n"


def test_uv_gets_what_the_configuration_files_of_pip_say(checkout: Path) -> None:
    file = checkout / "pip.conf"
    file.write_text(f"[global]\nindex-url = {SECRET}\nfind-links =\n    /a\n    /b\n")
    lines = make(checkout, f"UV={checkout}/uv", ".venv/.demo", settings={"PIP_CONFIG_FILE": str(file)}).splitlines()
    assert f"UV_DEFAULT_INDEX={SECRET}" in lines
    assert "UV_FIND_LINKS=/a,/b" in lines
    assert not [line for line in lines if line.startswith("UV_INDEX=")]


def test_other_recipes_do_not_get_them(checkout: Path) -> None:
    (checkout / "more.mk").write_text("show:\n\tenv\n")
    shown = make(checkout, f"UV={checkout}/uv", "-f", "Makefile", "-f", "more.mk", "show")
    assert f"PIP_INDEX_URL={SECRET}" in shown
    assert "UV_DEFAULT_INDEX" not in shown
    assert "UV_FIND_LINKS" not in shown
