"""docs/deploy-lint.md explains the public manifests as the lint finds them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inferctl.manifests import lint, manifests_file

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "deploy-lint.md"
PUBLIC = ROOT / "docs" / "examples" / "lint"


@pytest.mark.parametrize("name", ["vllm", "text-generation-inference", "triton"])
def test_the_page_explains_what_the_lint_finds_in_public_manifests(name: str) -> None:
    """The row of each manifest names only errors and warnings that the lint finds in it."""
    found = {f.rule for f in lint.lint(manifests_file.read([PUBLIC / f"{name}.yaml"])) if f.level != "note"}
    row = re.search(rf"^\| \[{name}\.yaml\].*\|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", row[1]))
    assert named
    assert named <= found


@pytest.mark.parametrize("name", ["vllm", "text-generation-inference", "triton"])
def test_schemas_accept_the_public_manifests(name: str) -> None:
    from tests.deploy import validation  # needs packages of `dev-deploy`

    objects = manifests_file.read([PUBLIC / f"{name}.yaml"])
    assert len(objects) >= 3
    assert [problem for each in objects for problem in validation.problems(each.data, "1.35")] == []
