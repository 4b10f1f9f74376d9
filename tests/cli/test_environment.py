"""Commands with an empty environment, without a home or a temporary folder, and where nothing can be written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import inferctl
from tests import processes

ROOT = Path(inferctl.__file__).parent.parent


def bare(folder: Path | str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
    return processes.inferctl(*arguments, cwd=folder, env=environment, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "environment",
    [{}, {"HOME": "/nowhere", "TMPDIR": "/nowhere", "LANG": "C", "TERM": "dumb", "CI": "true"}],
    ids=["empty", "ci-without-folders"],
)
@pytest.mark.parametrize("command", ["doctor", "render --model org/m"])
def test_a_command_needs_nothing_of_the_environment(command: str, environment: dict[str, str], tmp_path: Path) -> None:
    done = bare(tmp_path, *command.split(), **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr, "no colors and no cursor movements without a terminal"
